"""One model's life on real parts: adopted, upgraded, approved, released, rolled back; a harmful upgrade is stopped.

The tests of this file are one story and run in order. Engines started: version 1, version 2, version 2 again after it
was killed, the harmful candidate, the branch's states, the branch on the base: six, with room for one more.
"""

import asyncio
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.demo_traffic import USERS
from flows.stack import client_login, client_variables
from mansard.launch import Request, derive
from mansard.models.storeys import read_expansion
from mansard.release.journal import Journal
from mansard.serving.host.release_users import read_users
from mansard.store.store import Store
from tests.chaos.kills import Kill, strike, workers
from tests.end_to_end.conftest import COMMAND_TIMEOUT_SECONDS, ROOT, Story

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def wait_for(condition: Callable[[], Any], what: str, deadline_seconds: float = 1800) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + deadline_seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.2)
    raise AssertionError(f"not within {deadline_seconds:.0f} s: {what}")


@contextlib.contextmanager
def traffic(story: Story) -> Iterator[Callable[[], dict[str, Any]]]:
    """Users who keep asking until the block ends; yields a reader of their counts."""
    counts = story.folder / "traffic.json"
    counts.unlink(missing_ok=True)
    url = f"http://127.0.0.1:{story.site.ports.router}"
    process = subprocess.Popen([sys.executable, "-m", "flows.demo_traffic", url, "demo", str(counts)])

    def read() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(counts.read_text())
        return found

    try:
        wait_for(lambda: counts.exists() and read()["requests"] >= 3, "the users ask")
        wait_for(lambda: asyncio.run(read_users(story.site, "demo", ()))[1].named >= USERS, "every user to be seen")
        yield read
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=COMMAND_TIMEOUT_SECONDS)


def engine_of(story: Story, version: int) -> dict[str, Any]:
    """What the host says of the engine that serves a version."""
    told = story.json("status")
    artifact = next(v["artifact"] for v in told["models"]["demo"]["versions"] if v["version"] == version)
    found: dict[str, Any] = next(e for e in told["host"]["engines"] if e["artifact"] == artifact)
    return found


def process_of(story: Story, name: str) -> dict[str, Any]:
    """One program of the local stack."""
    found: dict[str, Any] = next(p for p in story.json("status")["processes"] if p["name"] == name)
    return found


def kill_in_training(story: Story, spec: str) -> None:
    """Start the upgrade and `kill -9` the command while its training works; the worker ends with it."""
    log = story.folder / "killed.log"
    with log.open("wb") as output:
        begun = subprocess.Popen(story.command("upgrade", spec), cwd=story.folder, stdout=output, stderr=output)
    work = story.site.store / "work"
    known = set(work.glob("*/*.safetensors"))
    wait_for(lambda: begun.poll() is not None or set(work.glob("*/*.safetensors")) - known, "a checkpoint is there")
    assert begun.poll() is None, log.read_text()
    begun.kill()
    begun.wait()


def kill_at(story: Story, spec: str, kill: Kill) -> None:
    """Start the upgrade and strike at the moment; what is not hit ends by itself."""
    log = story.folder / f"killed-at-{kill.moment}.log"
    with log.open("wb") as output:
        begun = subprocess.Popen(story.command("upgrade", spec), cwd=story.folder, stdout=output, stderr=output)
        is_struck = strike(kill, begun, story.site, {"quantize": 10.0, "evaluate": 5.0})
        begun.wait()
    assert is_struck, log.read_text()
    wait_for(lambda: not workers(story.site), "no worker outlives its command")


def upgrade_twice_at_once(story: Story, spec: str) -> list[dict[str, Any]]:
    """What two commands of one spec said that began together."""
    begun = [
        subprocess.Popen([*story.command("upgrade", spec), "--json"], stdout=subprocess.PIPE, cwd=story.folder)
        for _ in range(2)
    ]
    told = [json.loads(command.communicate(timeout=COMMAND_TIMEOUT_SECONDS)[0]) for command in begun]
    assert [command.returncode for command in begun] == [0, 0]
    return told


def ids_of_an_undisturbed_run(story: Story, version: int, scratch: Path) -> dict[str, str]:
    """Expansion, training and fusion of a version made again in an empty store: stage -> snapshot."""
    store, empty = Store.of(story.site), Store(scratch / "store")
    with Journal.open(story.site.journal) as journal:
        stages = journal.registration("demo", version).stages
    made: dict[str, str] = {}
    for stage, recipe, snapshot in stages:
        if stage in ("expand", "train", "fuse"):
            record = next(r for r in store.lineage(snapshot) if r["recipe"] == recipe)
            for number, wanted in enumerate(i for i in record["inputs"].values() if not empty.holds(i)):
                folder = scratch / f"{stage}-{number}"
                store.restore(wanted, folder)
                assert empty.snapshot(folder) == wanted
            made[stage] = derive(empty, story.site, Request(stage, record["inputs"], record["spec"])).snapshot
    return made


def schedule_every_minute(story: Story, name: str, spec: str) -> None:
    """Put a cron line into the site; `mansard up` takes it over."""
    tree = yaml.safe_load(story.site.path.read_text())
    tree["schedules"] = [{"name": name, "spec": spec, "cron": "* * * * *", "author": "ada"}]
    story.site.path.write_text(yaml.safe_dump(tree, sort_keys=False))
    story.run("up")


def test_adopted_base_is_version_1_and_serves_after_approval(story: Story) -> None:
    adopted = story.in_terminal("adopt", "configs/adopt/test.yaml")
    assert adopted.lines()[-3:] == ["next: mansard review 1", "version 1 of demo: baseline", ""]
    assert sum("━" in line for line in adopted.lines()) >= 4, "a bar a stage"
    story.run("release", 1, "--as", "ada", status=5)
    story.run("approve", 1, "--as", "ada", "--reason", "mine", status=5)
    story.run("approve", 1, "--as", "mallory", "--reason", "a stranger", status=5)
    story.run("approve", 1, "--as", "grace", "--reason", "the base our users know")
    story.run("release", 1, "--as", "ada")
    assert story.stable() == 1
    story.run("rollback", "--as", "grace", status=7)


def test_upgrade_that_was_killed_four_times_improves_the_target_and_spares_the_guard(story: Story) -> None:
    spec = "configs/upgrade/test.yaml"
    kill_in_training(story, spec)
    kill_at(story, spec, Kill("quantize", "worker", 0.5))
    kill_at(story, spec, Kill("evaluate", "both", 0.5))
    kill_at(story, spec, Kill("judge", "command", 0.0))
    upgraded, other = upgrade_twice_at_once(story, spec)
    assert (upgraded["version"], upgraded["verdict"]) == (other["version"], other["verdict"]) == (2, "pass")
    assert [(s["name"], s["snapshot"]) for s in upgraded["stages"]] == [
        (s["name"], s["snapshot"]) for s in other["stages"]
    ]
    suites = {s["suite"]: s for s in upgraded["suites"]}
    assert suites["code-bits"]["after"] < suites["code-bits"]["before"]
    assert suites["docstrings-bits"]["interval"][1] < 0.02
    assert Path(upgraded["chart"]).read_bytes().startswith(b"\x89PNG")
    assert all(s["reused"] for s in upgraded["stages"] if s["name"] in ("train", "fuse", "quantize"))
    registered = [e["version"] for e in story.json("history") if e["kind"] == "registered"]
    assert registered == [1, 2]
    story.run("verify")


def test_killed_upgrade_has_the_ids_of_an_undisturbed_one(story: Story, tmp_path: Path) -> None:
    made = ids_of_an_undisturbed_run(story, 2, tmp_path)
    with Journal.open(story.site.journal) as journal:
        ids = {stage: snapshot for stage, _, snapshot in journal.registration("demo", 2).stages}
    assert made == {stage: ids[stage] for stage in ("expand", "train", "fuse")}


def test_review_tells_the_report_and_writes_a_page_that_needs_nothing_else(story: Story) -> None:
    told = story.run("review", 2)
    for words in ("Attempt 1", "code-bits", "for the worse", "for the better", "against the anchor", "approve 2"):
        assert words in told
    facts = story.json("review", 2)
    page = Path(facts["page"]).read_text()
    assert "first_token" in page and "mansard review" not in page
    assert not any(outside in page for outside in ("<script", "<link", 'src="http', "url("))
    assert len(facts["verdict"]["suites"][0]["changes"]["best"]) == 10


def test_same_upgrade_again_does_no_work_and_is_the_same_version(story: Story) -> None:
    again = story.json("upgrade", "configs/upgrade/test.yaml")
    assert (again["version"], again["verdict"]) == (2, "pass")
    assert all(s["reused"] for s in again["stages"])


def test_killed_canary_engine_aborts_the_rollout_and_loses_no_request(story: Story) -> None:
    story.run("approve", 2, "--as", "grace", "--reason", "code improves, docstrings hold")
    with traffic(story) as counts:
        engine = engine_of(story, 2)
        release = subprocess.Popen(
            story.command("release", 2, "--as", "ada"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        wait_for(lambda: counts()["versions"].get("2", 0) >= 2, "version 2 answers users")
        os.kill(engine["pid"], signal.SIGKILL)
        output, _ = release.communicate(timeout=COMMAND_TIMEOUT_SECONDS)
        assert release.returncode == 4, output
        seen = counts()["requests"]
        wait_for(lambda: counts()["requests"] >= seen + 10, "users are served on")
    assert counts()["failed"] == 0, counts()
    assert story.stable() == 1
    story.run("release", 2, "--as", "ada", status=5)


def test_release_and_rollback_under_traffic_lose_nothing(story: Story) -> None:
    story.run("approve", 2, "--as", "grace", "--reason", "the engine was killed on purpose")
    with traffic(story) as counts:
        story.run("release", 2, "--as", "ada")
        assert story.stable() == 2
        rolled = story.json("rollback", "--as", "grace", "--why", "drill")
        assert (rolled["changed"], rolled["stable"]) == (True, 1)
        again = story.json("rollback", "--as", "ada")
        assert (again["changed"], again["stable"]) == (False, 1)
        seen = counts()["versions"]["1"]
        wait_for(lambda: counts()["versions"]["1"] >= seen + 10, "version 1 answers users again")
    assert (counts()["failed"], counts()["broken_streams"]) == (0, 0), counts()
    assert counts()["requests"] >= 30
    story.run("verify", "--journal")


WALK = """
import json, sys, mlflow
client = mlflow.MlflowClient(sys.argv[1])
stable = client.get_model_version_by_alias("demo", "stable")
two = next(v for v in client.search_model_versions("name='demo'") if v.tags["mansard_version"] == "2")
snapshots, data, waiting = {}, set(), [two.source.removeprefix("models:/")]
while waiting:
    model = client.get_logged_model(waiting.pop())
    if model.model_id not in snapshots:
        snapshots[model.model_id] = model.tags["mansard_snapshot"]
        inputs = client.get_run(model.source_run_id).inputs
        waiting += [m.model_id for m in inputs.model_inputs]
        data |= {d.dataset.digest for d in inputs.dataset_inputs}
parent = client.get_run(client.get_run(two.run_id).data.tags["mlflow.parentRunId"])
print(json.dumps({
    "stable": stable.tags,
    "snapshots": sorted(snapshots.values()),
    "data": sorted(data),
    "artifacts": [a.path for a in client.list_artifacts(parent.info.run_id, "verdict")],
    "metrics": parent.data.metrics,
    "versions": sorted(v.tags["mansard_version"] for v in client.search_model_versions("name='demo'")),
    "parents": [r.data.tags["mansard_upgrade"] for r in client.search_runs([parent.info.experiment_id])
                if "mansard_upgrade" in r.data.tags],
}))
"""


def test_mlflow_leads_from_the_version_to_the_base(story: Story) -> None:
    def walked() -> dict[str, Any] | None:
        url = f"http://127.0.0.1:{story.site.ports.mlflow}"
        variables = {**os.environ, **client_login(story.site)}
        done = subprocess.run([sys.executable, "-c", WALK, url], capture_output=True, text=True, env=variables)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found if found["stable"].get("mansard_version") == "1" else None

    found = wait_for(walked, "the mirror wrote alias stable to version 1")
    assert found["stable"]["mansard_model"] in found["snapshots"]
    assert len(found["data"]) >= 4
    assert found["versions"] == ["1", "2"], "the killed upgrade, asked for by two commands at once, is one version"
    assert len(found["parents"]) == len(set(found["parents"])) >= 2
    assert {"verdict/chart.png", "verdict/report.md", "verdict/report.html"} <= set(found["artifacts"])
    assert found["metrics"]["code-bits.after"] < found["metrics"]["code-bits.before"]
    assert found["stable"]["mansard_artifact"] in json.dumps(story.json("why", 2))


def test_rollback_works_with_every_server_down(story: Story) -> None:
    story.run("approve", 2, "--as", "grace", "--reason", "the drill went well")
    with traffic(story):
        story.run("release", 2, "--as", "ada")
    for name in ("prefect", "mlflow", "host"):
        os.killpg(process_of(story, name)["pid"], signal.SIGKILL)
    rolled = story.json("rollback", "--as", "grace", "--from", 2, "--why", "everything is down")
    assert (rolled["changed"], rolled["stable"]) == (True, 1)
    kinds = [e["kind"] for e in story.json("history")]
    assert kinds[-1] == "rolled_back"
    story.run("up")
    assert story.stable() == 1


def test_harmful_upgrade_is_stopped_by_the_guard_and_cannot_be_approved(story: Story) -> None:
    harmful = story.json("upgrade", "configs/upgrade/harmful.yaml", status=3)
    assert harmful["verdict"] == "fail"
    guard = next(s for s in harmful["suites"] if s["role"] == "guard")
    assert guard["interval"][0] > 0.02
    made = {stage["name"]: stage["snapshot"] for stage in harmful["stages"]}
    gains = json.loads(Store(story.site.store).read_file(made["importance"], "importance.json"))["gains"]
    copied = {b.source for b in read_expansion(Store(story.site.store), made["expand"]).new_blocks}
    assert copied == set(sorted(range(len(gains)), key=lambda block: gains[block])[:2])
    (link,) = story.json("why", harmful["version"])["chain"][:1]
    assert (link["model"], link["storeys"]) == (made["average"], [])
    assert link["artifact"] == link["model"] and "quantize" not in made  # `scheme: none` serves the model as it is
    words = " ".join(story.ran("review", harmful["version"]).stdout.split())  # a table's title is wrapped
    assert "so nothing of this model is frozen" in words
    story.run("approve", harmful["version"], "--as", "grace", "--reason", "looks fine to me", status=5)
    story.run("release", harmful["version"], "--as", "ada", status=5)


def test_gate_judges_a_version_again_against_what_is_stable_now(story: Story) -> None:
    again = story.json("gate", 2)
    assert (again["version"], again["verdict"]) == (2, "pass")


def test_removed_storey_leaves_version_1_as_a_candidate_that_starts_no_engine(story: Story) -> None:
    one, two = (story.json("why", version)["chain"][0] for version in (1, 2))
    assert [len(link["storeys"]) for link in (one, two)] == [0, 1]
    removed = story.json("remove-storey", 2, 1, "--as", "ada")
    assert removed["verdict"] == "pass"
    assert all(s["reused"] for s in removed["stages"] if s["name"] in ("quantize", "evaluate", "fingerprint"))
    told = story.json("why", removed["version"])["chain"]
    assert [link["version"] for link in told] == [removed["version"], 2, 1]
    assert (told[0]["model"], told[0]["artifact"], told[0]["storeys"]) == (one["model"], one["artifact"], [])
    assert story.json("remove-storey", 2, 1, "--as", "ada")["version"] == removed["version"]


def test_the_readmes_commands_for_a_branch_per_customer(story: Story) -> None:
    """The README's own words, with the version's real number; the shipped spec, with less training."""
    commands = commands_under("## A branch per customer")
    assert [words[0] for words in commands] == ["customize", "review", "approve", "release", "rollback"]
    before = story.stable()
    made = story.json(*commands[0])
    assert made["verdict"] == "pass"
    review, approve, release, rollback = (
        [str(made["version"]) if word == "3" else word for word in words] for words in commands[1:]
    )
    assert "code-bits" in story.run(*review)
    story.run(*approve)
    with traffic(story) as counts:
        story.run(*release)
        assert story.stable() == made["version"]
        story.run(*rollback)
    assert (counts()["failed"], counts()["broken_streams"]) == (0, 0), counts()
    assert story.stable() == before


def commands_under(heading: str) -> list[list[str]]:
    """The words of every `mansard` line in the README's first block under a heading."""
    block = (ROOT / "README.md").read_text().split(heading, 1)[1].split("```")[1]
    return [shlex.split(line, comments=True)[1:] for line in block.strip().splitlines()]


def test_scheduled_upgrade_runs_by_cron_and_finds_everything_made(story: Story) -> None:
    registered = [e["version"] for e in story.json("history") if e["kind"] == "registered"]
    schedule_every_minute(story, "nightly", "../upgrade/test.yaml")
    code = """
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter

# The next hundred runs are scheduled already, more than one answer holds: only those that ended are asked for.
only = FlowRunFilter.model_validate({"state": {"type": {"any_": ["COMPLETED"]}}})
named = DeploymentFilter.model_validate({"name": {"any_": ["nightly"]}})
with get_client(sync_client=True) as client:
    runs = client.read_flow_runs(deployment_filter=named, flow_run_filter=only, limit=50)
print(sum(r.auto_scheduled for r in runs))
"""
    variables = {**os.environ, **client_variables(story.site), **client_login(story.site)}

    def completed() -> bool:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=variables)
        return int(done.stdout) > 0

    wait_for(completed, "a scheduled run completed")
    assert [e["version"] for e in story.json("history") if e["kind"] == "registered"] == registered


@pytest.mark.parametrize("columns", [80, 120])
def test_every_verb_that_shows_something_fits_the_terminal_in_the_end(story: Story, columns: int) -> None:
    versions = sorted({e["version"] for e in story.json("history") if e["kind"] == "registered"})
    chosen = versions if columns == 80 else [2]
    verbs: list[tuple[object, ...]] = [(verb, version) for verb in ("why", "review") for version in chosen]
    verbs += [("status",), ("history",), ("verify",), ("verify", "--journal"), ("pin",), ("collect", "--dry-run")]
    for words in (*verbs, ("up",)):
        assert story.in_terminal(*words, columns=columns).lines()[0], words
