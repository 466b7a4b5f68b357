"""The stack's real servers, once: started by two commands at the same time, used by a flow, ended."""

import json
import os
import platform
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import stack
from mansard.private_files import open_paths
from mansard.release import keys
from mansard.site import Site, load_site
from tests.free_ports import free_ports

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
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


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=60))


def prefect(site: Site, path: str, body: dict[str, Any] | None = None) -> Any:
    return ask(f"http://127.0.0.1:{site.ports.prefect}/api{path}", body)


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


def test_no_other_user_reads_or_writes_in_the_home_of_a_running_stack(site: Site) -> None:
    derive(site)
    assert open_paths(site) == []
    for path in (site.home, site.journal, site.home / "mlflow/mlflow.sqlite3", site.logs / "prefect.log"):
        as_nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs")
        done = subprocess.run([*(as_nobody if os.getuid() == 0 else ()), "cat", str(path)], capture_output=True)
        assert os.getuid() != 0 or (done.returncode, b"Permission denied" in done.stderr) == (1, True)


def test_flow_derives_a_real_stage_that_prefect_and_mlflow_show(site: Site) -> None:
    first = derive(site)
    assert not first["reused"]
    assert derive(site) == {"snapshot": first["snapshot"], "reused": True}
    runs = prefect(site, "/flow_runs/filter", {"flows": {"name": {"any_": ["cut"]}}})
    assert [run["state_type"] for run in runs] == ["COMPLETED", "COMPLETED"]
    artifacts = prefect(site, "/artifacts/filter", {"artifacts": {"key": {"any_": ["mansard-corpus"]}}})
    assert [a["data"] for a in artifacts] == [100.0]
    api = f"http://127.0.0.1:{site.ports.mlflow}/api/2.0/mlflow"
    experiment = ask(f"{api}/experiments/get-by-name?experiment_name=mansard/demo")["experiment"]
    runs = ask(f"{api}/runs/search", {"experiment_ids": [experiment["experiment_id"]]})["runs"]
    assert {(r["info"]["run_name"], r["info"]["status"]) for r in runs} == {("cut", "FINISHED"), ("corpus", "FINISHED")}
    tags = [{t["key"]: t["value"] for t in r["data"]["tags"]} for r in runs]
    assert first["snapshot"] in [t.get("mansard_snapshot") for t in tags]


def test_deployments_are_found_by_module_and_run_by_prefect(site: Site) -> None:
    made = {(d["name"], d["entrypoint"]): d for d in prefect(site, "/deployments/filter", {})}
    nightly = made["nightly", "flows.upgrade.upgrade"]
    assert [s["schedule"]["cron"] for s in nightly["schedules"]] == ["0 3 * * *"]
    assert nightly["parameters"]["as_person"] == "ada"
    rollback = made["on-demand", "flows.rollback.rollback"]
    run = prefect(site, f"/deployments/{rollback['id']}/create_flow_run", {"parameters": {"who": "ada"}})
    path = f"/flow_runs/{run['id']}"
    wait_for(lambda: prefect(site, path)["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED"), "the flow run ends")
    state = prefect(site, path)["state"]
    assert state["type"] == "FAILED"
    assert "nothing to go back to" in state["message"]


def test_killed_program_is_started_again_by_up(site: Site) -> None:
    before = {r["name"]: r["pid"] for r in stack.status_of_processes(site)}
    os.kill(before["router"], 9)
    wait_for(lambda: not stack.is_up(site), "the router is gone")
    stack.up(site, lambda line: None)
    after = {r["name"]: r["pid"] for r in stack.status_of_processes(site)}
    assert {name for name in after if after[name] != before[name]} == {"router"}
