"""The stack's real servers, once: started by two commands at the same time, used by a flow, ended."""

import json
import os
import platform
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import stack
from mansard.page_password import authorization, password_file
from mansard.private_files import open_paths
from mansard.release import keys
from mansard.site import Site, load_site
from tests.free_ports import free_ports

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ENDED = ("COMPLETED", "FAILED", "CRASHED")
CORPUS = {
    "format": 1,
    "seed": 0,
    "train_code_bytes": 20_000,
    "train_docstring_bytes": 20_000,
    "items_per_suite": 4,
    "choice_items": 4,
    "python": platform.python_version(),
}
DERIVE = f"""
import json, sys
from pathlib import Path
from flows.stack import use_servers
from mansard.launch import Request
from mansard.private_files import use_private_umask
from mansard.site import load_site

site = load_site(Path(sys.argv[1]))
use_servers(site)
use_private_umask()
from prefect import flow
from tasks import policy
from tasks.derivation import Asked, Work, derive_one, recorded

@policy.derivation
def corpus(work: Work):
    return derive_one(work, Asked(Request("corpus", {{}}, {CORPUS!r}), "corpus"))

@flow
def cut():
    with recorded(site, "demo", "cut", "k" * 64, {{}}) as work:
        return corpus(work)

made = cut()
print(json.dumps({{"snapshot": made.snapshot, "reused": made.reused}}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site of free ports whose stack two commands started at once."""
    folder = tmp_path_factory.mktemp("servers")
    tree = yaml.safe_load((ROOT / "configs/site/local.yaml").read_text())
    tree["ports"] = dict(zip(("prefect", "mlflow", "router", "engines_from"), free_ports(4), strict=True))
    tree["home"], tree["data"] = str(folder / "home"), str(folder / "data")
    lock = str(ROOT / "infra/constraints/main.txt")
    tree["environments"] = {name: {"python": sys.executable, "lock": lock} for name in ("main", "serve")}
    tree["people"] = {"ada": {"roles": ["author", "operator"], "public_key": str(folder / "home/keys/ada.pub")}}
    spec = str(ROOT / "configs/upgrade/demo.yaml")
    tree["schedules"] = [{"name": "nightly", "spec": spec, "cron": "0 3 * * *", "author": "ada"}]
    path = folder / "site.yaml"
    path.write_text(yaml.safe_dump(tree))
    made = load_site(path)
    keys.generate_key("ada", made)
    try:
        first, second = (mansard("up", "--site", str(path)) for _ in range(2))
        for command in (first, second):
            told, _ = command.communicate(timeout=1200)
            assert command.returncode == 0, told
        yield made
    finally:
        stack.down(made, lambda line: None)


def mansard(*words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "flows.cli", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ask(url: str, site: Site, body: dict[str, Any] | None = None, method: str | None = None) -> Any:
    """The JSON that a logged-in client gets; Prefect's wants a token for what changes something."""
    headers = {"Content-Type": "application/json", **authorization(site)}
    if body is not None and f":{site.ports.prefect}/" in url:
        token = ask(f"http://127.0.0.1:{site.ports.prefect}/api/csrf-token?client=test", site)["token"]
        headers.update({"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": "test"})
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers, method=method)
    text = b""

    def is_answered() -> bool:
        nonlocal text
        try:
            text = urllib.request.urlopen(request, timeout=60).read()
        except urllib.error.HTTPError as error:
            if error.code == 503:  # SQLite is locked for a moment; Prefect's own client asks again, too
                return False
            raise
        return True

    wait_for(is_answered, url, deadline_seconds=60)
    return json.loads(text) if text else None


def prefect(site: Site, path: str, body: dict[str, Any] | None = None, method: str | None = None) -> Any:
    return ask(f"http://127.0.0.1:{site.ports.prefect}/api{path}", site, body, method)


def derive(site: Site) -> dict[str, Any]:
    """The corpus, cut by a flow in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", DERIVE, str(site.path)], capture_output=True, text=True, timeout=1200, cwd=site.home
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)  # and nothing else: standard output is the command's own
    return found


def wait_for(condition: Callable[[], bool], what: str, deadline_seconds: float = 1800) -> None:
    deadline = time.monotonic() + deadline_seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {deadline_seconds:.0f} s: {what}"
        time.sleep(0.2)


def test_two_commands_at_once_make_one_stack(site: Site) -> None:
    records = stack.status_of_processes(site)
    assert {r["name"]: r["state"] for r in records} == dict.fromkeys(
        ("prefect", "mlflow", "host", "router", "mirror", "deployments"), "running"
    )
    started = [log.read_text().count("Uvicorn running on") for log in (site.logs / "mlflow.log",)]
    assert started == [1]
    told: list[str] = []
    stack.up(site, told.append)
    assert told == []
    assert [r["pid"] for r in stack.status_of_processes(site)] == [r["pid"] for r in records]


def test_flow_derives_a_real_stage_that_prefect_and_mlflow_show(site: Site) -> None:
    first = derive(site)
    assert not first["reused"]
    assert derive(site) == {"snapshot": first["snapshot"], "reused": True}
    runs = prefect(site, "/flow_runs/filter", {"flows": {"name": {"any_": ["cut"]}}})
    assert [run["state_type"] for run in runs] == ["COMPLETED", "COMPLETED"]
    artifacts = prefect(site, "/artifacts/filter", {"artifacts": {"key": {"any_": ["mansard-corpus"]}}})
    assert [a["data"] for a in artifacts] == [100.0]
    api = f"http://127.0.0.1:{site.ports.mlflow}/api/2.0/mlflow"
    experiment = ask(f"{api}/experiments/get-by-name?experiment_name=mansard/demo", site)["experiment"]
    runs = ask(f"{api}/runs/search", site, {"experiment_ids": [experiment["experiment_id"]]})["runs"]
    assert {(r["info"]["run_name"], r["info"]["status"]) for r in runs} == {("cut", "FINISHED"), ("corpus", "FINISHED")}
    tags = [{t["key"]: t["value"] for t in r["data"]["tags"]} for r in runs]
    assert first["snapshot"] in [t.get("mansard_snapshot") for t in tags]


def test_no_other_user_reads_or_writes_in_the_home_of_a_running_stack(site: Site) -> None:
    derive(site)
    assert open_paths(site) == []
    for path in (site.home, site.journal, site.home / "mlflow/mlflow.sqlite3", site.logs / "prefect.log"):
        as_nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs")
        done = subprocess.run([*(as_nobody if os.getuid() == 0 else ()), "cat", str(path)], capture_output=True)
        assert os.getuid() != 0 or (done.returncode, b"Permission denied" in done.stderr) == (1, True)


def test_schedule_is_a_deployment_without_parameters_and_no_verb_of_a_person_is_one(site: Site) -> None:
    made = prefect(site, "/deployments/filter", {})
    assert [(d["name"], d["parameters"]) for d in made] == [("nightly", {})]
    assert made[0]["parameter_openapi_schema"]["properties"] == {}
    assert [s["schedule"]["cron"] for s in made[0]["schedules"]] == ["0 3 * * *"]


def test_edited_deployment_runs_the_site_s_flow_and_nothing_else(site: Site, tmp_path: Path) -> None:
    """Also for somebody who has the password: pull steps, entrypoint, path and parameters are read by nobody."""
    (nightly,) = prefect(site, "/deployments/filter", {})
    mark = tmp_path / "ran"
    step = {"prefect.deployments.steps.run_shell_script": {"script": f"touch {mark}"}}
    parameters = {"site_path": str(tmp_path / "site.yaml"), "as_person": "grace"}
    edited = {
        "pull_steps": [step], "entrypoint": "flows.gate.gate", "path": str(tmp_path),
        "enforce_parameter_schema": False, "job_variables": {"command": f"touch {mark}"},
    }  # fmt: skip
    prefect(site, f"/deployments/{nightly['id']}", edited, "PATCH")
    states = {}
    for name, sent in (("plain", {}), ("with parameters", parameters)):
        run = prefect(site, f"/deployments/{nightly['id']}/create_flow_run", {"parameters": sent})
        path = f"/flow_runs/{run['id']}"
        wait_for(lambda p=path: prefect(site, p)["state"]["type"] in ENDED, f"the run {name} ends")  # type: ignore[misc]
        states[name] = prefect(site, path)["state"]
    assert {name: state["type"] for name, state in states.items()} == {"plain": "FAILED", "with parameters": "CRASHED"}
    # The site's own upgrade ran, and has no base to start from; the other run never reached it.
    assert "nothing is stable" in states["plain"]["message"] or str(site.data) in states["plain"]["message"], states
    assert not mark.exists()


def status_of(url: str, *arguments: str, as_nobody: bool = False) -> int:
    """The HTTP status that curl gets."""
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if as_nobody else []
    command = [*user, "curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", *arguments, url]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another Unix user takes root")
def test_another_unix_user_reads_and_runs_nothing(site: Site) -> None:
    (nightly,) = prefect(site, "/deployments/filter", {})
    pages = {
        site.ports.prefect: ("/", "/docs", "/openapi.json", "/ui-settings", "/api/version", "/api/admin/settings",
                             "/api/csrf-token?client=x", f"/api/deployments/{nightly['id']}"),
        site.ports.mlflow: ("/", "/version", "/graphql", "/metrics", "/api/2.0/mlflow/experiments/search",
                            "/ajax-api/2.0/mlflow/experiments/search", "/get-artifact", "/v1/traces",
                            "/api/2.0/mlflow-artifacts/artifacts", "/%2e%2e/health", "//health"),
    }  # fmt: skip
    for port, paths in pages.items():
        for path in paths:
            for more in ([], ["-X", "POST", "-d", "{}"], ["-u", "mansard:"], ["-H", "Cookie: session=old"]):
                assert status_of(f"http://127.0.0.1:{port}{path}", *more, as_nobody=True) == 401, (path, more)
    url = f"http://127.0.0.1:{site.ports.prefect}/api/deployments/{nightly['id']}"
    body = json.dumps({"pull_steps": [{"prefect.deployments.steps.run_shell_script": {"script": "id"}}]})
    json_body = ("-H", "Content-Type: application/json", "-d", body)
    assert status_of(url, "-X", "PATCH", *json_body, as_nobody=True) == 401
    assert status_of(f"{url}/create_flow_run", *json_body[:2], "-d", "{}", as_nobody=True) == 401
    reading = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "cat", str(password_file(site))]
    assert subprocess.run(reading, capture_output=True, check=False).returncode != 0


def test_foreign_page_asks_in_vain_even_with_the_browser_s_login(site: Site) -> None:
    """What a browser sends for a page of another origin: fetch, form, image, frame, and a rebound name."""
    login = ("-H", f"Authorization: {authorization(site)['Authorization']}")
    cross = ("-H", "Sec-Fetch-Site: cross-site", "-H", "Sec-Fetch-Mode: no-cors")
    frame = ("-H", "Sec-Fetch-Site: same-site", "-H", "Sec-Fetch-Mode: navigate", "-H", "Sec-Fetch-Dest: iframe")
    link = ("-H", "Sec-Fetch-Site: cross-site", "-H", "Sec-Fetch-Mode: navigate", "-H", "Sec-Fetch-Dest: document")
    for port in (site.ports.prefect, site.ports.mlflow):
        root = f"http://127.0.0.1:{port}/"
        for origin in ("http://evil.example", "null", "http://127.0.0.1:1", f"http://localhost:{port}"):
            simple = ("-H", f"Origin: {origin}", "-H", "Content-Type: text/plain", "-d", "{}")
            assert status_of(root, *login, *simple) == 403
        assert status_of(root, *login, *cross) == status_of(root, *login, *frame) == 403
        assert status_of(root, *login, *link, "-L") == 200
        assert status_of(root, *login, "-H", f"Host: evil.example:{port}") == 400
    socket_of_events = f"http://127.0.0.1:{site.ports.prefect}/api/events/out"
    upgrade = ("-H", "Connection: Upgrade", "-H", "Upgrade: websocket", "-H", "Sec-WebSocket-Version: 13",
               "-H", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", "-H", "Origin: http://evil.example")  # fmt: skip
    assert status_of(socket_of_events, *upgrade) == 403


def test_password_is_in_no_command_line_and_no_log(site: Site) -> None:
    password = password_file(site).read_text().strip().encode()
    assert stat.S_IMODE(password_file(site).stat().st_mode) == 0o600
    assert stat.S_IMODE(password_file(site).parent.stat().st_mode) == 0o700
    for record in stack.status_of_processes(site):
        assert password not in Path(f"/proc/{record['pid']}/cmdline").read_bytes()
        assert password not in Path(record["log"]).read_bytes()


def test_lost_password_is_replaced_and_its_programs_start_again(site: Site) -> None:
    before = {r["name"]: r["pid"] for r in stack.status_of_processes(site)}
    old = authorization(site)["Authorization"]
    password_file(site).unlink()
    lines: list[str] = []
    stack.up(site, lines.append)
    after = {r["name"]: r["pid"] for r in stack.status_of_processes(site)}
    assert {n for n in after if after[n] != before[n]} == {"prefect", "mlflow", "mirror", "deployments"}, lines
    url = f"http://127.0.0.1:{site.ports.prefect}/api/version"
    assert status_of(url, "-H", f"Authorization: {old}") == 401
    assert isinstance(prefect(site, "/version"), str)


def test_killed_program_is_started_again_by_up(site: Site) -> None:
    before = {r["name"]: r["pid"] for r in stack.status_of_processes(site)}
    os.kill(before["router"], 9)
    wait_for(lambda: not stack.is_up(site), "the router is gone")
    stack.up(site, lambda line: None)
    after = {r["name"]: r["pid"] for r in stack.status_of_processes(site)}
    assert {name for name in after if after[name] != before[name]} == {"router"}
