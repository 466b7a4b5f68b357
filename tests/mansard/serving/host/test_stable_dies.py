"""Stable's engine is killed under load: the version before serves its users within moments, people hear of it, and
stable serves again once it is up and answers as evaluation recorded. Host, router and journal are real."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mansard.errors import Conflict
from mansard.release.journal import Journal
from mansard.serving.process import identify, members_named
from mansard.site import load_site

ROOT = Path(__file__).resolve().parents[4]
pytestmark = pytest.mark.slow
SLOW_STEP = {
    "steps": [
        {"weight_percent": 50, "bake_seconds": 600, "min_requests": 10, "deadline_seconds": 1200},
    ],
    "max_error_excess": 0.02,
    "latency_tolerance": 50.0,
    "output_tolerance": 2.0,
}


def set_site(place: Any, **keys: Any) -> None:
    place.site.path.write_text(json.dumps({**json.loads(place.site.path.read_text()), **keys}))
    place.site = load_site(place.site.path)


def notices(place: Any) -> list[dict[str, Any]]:
    file = place.home / "notices"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def events(place: Any) -> list[str]:
    return [notice["event"] for notice in notices(place) if notice["event"].startswith("outage")]


def promote(place: Any, version: int) -> None:
    """What a rollout would have written."""
    with Journal.open(place.site.journal) as journal:
        journal.start_rollout("demo", version, "ada", "", journal.pointers("demo"))
        journal.promote("demo", version, "host", "", journal.pointers("demo"))
    place.wait_for(f"version {version}", lambda: place.ask() == (200, str(version)))


def in_service(place: Any, versions: int = 2, **keys: Any) -> None:
    """So many versions one after the other; the last does not start again while `place.home / "stuck"` is there."""
    program = ["sh", "-c", f"cat >> {place.home}/notices"]
    set_site(place, notify=program, **keys)
    place.start_host()
    place.start_router()
    for number in range(1, versions + 1):
        stuck = {"start_once": str(place.home / "stuck")} if number == versions else {}
        promote(place, place.register(voice=f"v{number}", **stuck))
    served = place.split
    place.wait_for("every engine", lambda: all(v.endpoint for v in served().versions.values()))
    assert len(served().versions) == versions


def kill_engine(place: Any, version: int) -> None:
    os.kill(place.engine_of(version)["pid"], signal.SIGKILL)


def let_start(place: Any) -> None:
    (place.home / "stuck").unlink()


def entries(place: Any) -> list[tuple[str, Any]]:
    """The outages' own entries: kind, and who serves."""
    with Journal.open(place.site.journal) as journal:
        journal.verify()
        outages = journal.entries("demo", kinds=("stable_down", "stable_up"))
    return [(entry.kind, entry.body.get("to")) for entry in outages]


def mansard(place: Any, *arguments: str) -> str:
    whole = [sys.executable, "-m", "flows.cli", *arguments, "--site", str(place.site.path)]
    variables = {**os.environ, "MANSARD_PERSON": "otto", "PYTHONPATH": str(ROOT)}
    process = subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, env=variables)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_previous_serves_the_users_of_a_dead_stable_until_it_is_back(place: Any, traffic: Any) -> None:
    in_service(place)
    traffic.start(4)
    place.wait_for("load", lambda: len(traffic.statuses) > 100)
    kill_engine(place, 2)
    place.wait_for("version 1", lambda: "1" in traffic.versions)
    split = place.split()
    assert (split.stable, split.stands_in_for, split.canary) == (1, 2, None)
    place.wait_for("the entry", lambda: entries(place) == [("stable_down", 1)])
    place.wait_for("the notice", lambda: events(place) == ["outage"])
    output = mansard(place, "status")
    first = output.splitlines()[0]
    assert first.startswith("demo: version 2 (stable) is down since ")
    assert "; version 1 serves its users; next: mansard rollback --from 2" in first
    assert "version 1 100 % (http" in output and "in place of version 2" in output and "DIFFERS" not in output
    outage = json.loads(mansard(place, "status", "--json"))["models"]["demo"]["outage"]
    assert (outage["version"], outage["served_by"]) == (2, 1)
    with Journal.open(place.site.journal) as journal:
        pointers = journal.pointers("demo")
    assert (pointers.stable, pointers.previous) == (2, 1)
    num_lost = len([s for s in traffic.statuses if s != 200])
    so_far = len(traffic.statuses)
    place.wait_for("more answers", lambda: len(traffic.statuses) > so_far + 100)
    with pytest.raises(Conflict, match=r"version 2 \(stable\) is down since"):
        place.start_rollout(1)
    let_start(place)
    place.wait_for("stable's return", lambda: entries(place) == [("stable_down", 1), ("stable_up", None)])
    place.wait_for("version 2", lambda: place.ask() == (200, "2"))
    assert (place.split().stable, place.split().stands_in_for) == (2, None)
    place.wait_for("the other notice", lambda: events(place) == ["outage", "outage_over"])
    traffic.stop()
    assert len([s for s in traffic.statuses if s != 200]) == num_lost, "after the move nobody lost an answer"
    assert num_lost < so_far
    assert "demo: version 2 (stable) is down" not in mansard(place, "status")
    assert "noticed: version 2 (stable) is down; version 1 serves its users" in mansard(place, "history")


def test_a_worker_of_the_engine_that_dies_alone_is_an_outage_too(place: Any) -> None:
    """As when the kernel, out of memory, kills the process that has the weights: the server still takes requests."""
    in_service(place, 1)
    promote(place, place.register(voice="v2", worker=True))
    place.wait_for("both engines", lambda: all(v.endpoint for v in place.split().versions.values()))
    server = identify(place.engine_of(2)["pid"])
    assert server is not None
    (worker,) = place.wait_for("its worker", lambda: members_named(server, "VLLM::"))
    os.kill(worker.pid, signal.SIGKILL)
    place.wait_for("stable's return", lambda: entries(place) == [("stable_down", 1), ("stable_up", None)])
    place.wait_for("version 2", lambda: place.ask() == (200, "2"))
    assert place.engine_of(2)["pid"] != server.pid
    assert "noticed: version 2 (stable) is down; version 1 serves its users" in mansard(place, "history")


@pytest.mark.parametrize(("versions", "keys"), [(2, {"when_stable_is_dead": "wait"}), (1, {})])
def test_where_nobody_may_stand_in_the_outage_is_told_and_nothing_moves(
    place: Any, versions: int, keys: dict[str, str]
) -> None:
    in_service(place, versions, **keys)
    kill_engine(place, versions)
    place.wait_for("the entry", lambda: entries(place) == [("stable_down", None)])
    place.wait_for("the notice", lambda: events(place) == ["outage"])
    assert (place.split().stable, place.split().stands_in_for) == (versions, None)
    assert place.ask()[0] == 503
    first = mansard(place, "status").splitlines()[0]
    assert "; nobody serves its users (503); next: mansard " in first
    assert ("rollback --from 2" in first) == (versions == 2)
    let_start(place)
    place.wait_for("stable's return", lambda: entries(place) == [("stable_down", None), ("stable_up", None)])
    place.wait_for("an answer", lambda: place.ask() == (200, str(versions)))


def test_a_rollback_during_the_outage_is_for_good(place: Any) -> None:
    in_service(place)
    kill_engine(place, 2)
    place.wait_for("the entry", lambda: entries(place) == [("stable_down", 1)])
    assert "version 1 is stable again, was 2" in mansard(place, "rollback", "--from", "2", "--why", "night")
    let_start(place)
    assert (place.split().stable, place.split().stands_in_for) == (1, None)
    place.wait_for("the host", lambda: place.status()["models"]["demo"]["outage"] is None)
    assert place.ask() == (200, "1")
    place.wait_for("the entries", lambda: entries(place) == [("stable_down", 1)])


def test_a_host_that_starts_in_the_middle_of_an_outage_goes_on(place: Any) -> None:
    in_service(place)
    kill_engine(place, 2)
    place.wait_for("the entry", lambda: entries(place) == [("stable_down", 1)])
    place.end_host(signal.SIGKILL)
    place.start_host()
    assert place.ask() == (200, "1")
    assert place.status()["models"]["demo"]["outage"]["served_by"] == 1
    let_start(place)
    place.wait_for("stable's return", lambda: entries(place) == [("stable_down", 1), ("stable_up", None)])
    place.wait_for("version 2", lambda: place.ask() == (200, "2"))


def test_an_engine_that_died_while_no_host_ran_is_an_outage_too(place: Any) -> None:
    in_service(place)
    pid = place.engine_of(2)["pid"]
    place.end_host(signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    place.wait_for("the engine's end", lambda: place.ask()[0] == 503)
    assert "works without it" in mansard(place, "status")
    place.start_host()
    place.wait_for("version 1", lambda: place.ask() == (200, "1"))
    place.wait_for("the entries", lambda: entries(place) == [("stable_down", 1)])
    place.end_host(signal.SIGKILL)
    assert "nothing changed" in mansard(place, "rollback", "--from", "7")
    assert place.ask() == (200, "1"), "a command without the host leaves the version that stands in"
    place.start_host()


def test_users_are_moved_and_people_told_while_the_journal_is_down_and_the_entry_follows(
    place: Any, postgres: Any
) -> None:
    in_service(place, journal=postgres.new_journal())
    pid = place.engine_of(2)["pid"]
    place.wait_for("the memory", lambda: json.loads(place.site.memory_file.read_bytes())["term"] == 4)
    postgres.stop()
    try:
        os.kill(pid, signal.SIGKILL)
        place.wait_for("version 1", lambda: place.ask() == (200, "1"))
        place.wait_for("the notice", lambda: events(place) == ["outage"])
        first = mansard(place, "status").splitlines()[0]
        assert first.startswith("demo: version 2 (stable) is down; version 1 serves its users; next: mansard rollback")
    finally:
        postgres.start()
    place.wait_for("the entry", lambda: entries(place) == [("stable_down", 1)])
    let_start(place)
    place.wait_for("stable's return", lambda: entries(place) == [("stable_down", 1), ("stable_up", None)])
    place.wait_for("the other notice", lambda: events(place) == ["outage", "outage_over"])


def test_a_stable_that_comes_back_with_another_fingerprint_waits_until_it_is_right(place: Any) -> None:
    in_service(place, 1)
    babbles = place.home / "babbles"
    promote(place, place.register(voice="v2", babble_once=str(babbles)))
    place.wait_for("two engines", lambda: all(v.endpoint for v in place.split().versions.values()))
    kill_engine(place, 2)
    place.wait_for("both entries", lambda: entries(place) == [("stable_down", 1), ("stable_down", 1)])
    assert place.ask() == (200, "1")
    assert "its fingerprint is not the recorded one" in mansard(place, "status")
    babbles.unlink()
    kill_engine(place, 2)
    place.wait_for("stable's return", lambda: entries(place)[-1] == ("stable_up", None))
    place.wait_for("version 2", lambda: place.ask() == (200, "2"))


def test_a_fingerprint_that_cannot_be_read_is_not_told_as_another_one(place: Any) -> None:
    in_service(place)
    with Journal.open(place.site.journal) as journal:
        manifest = place.store.root / "manifests" / journal.registration("demo", 2).fingerprint
    hidden = manifest.with_suffix(".hidden")
    manifest.rename(hidden)
    kill_engine(place, 2)
    let_start(place)
    place.wait_for("the reason", lambda: "could not be compared: " in mansard(place, "status"))
    assert "is not the recorded one" not in mansard(place, "history")
    assert place.ask() == (200, "1")
    hidden.rename(manifest)
    place.wait_for("stable's return", lambda: entries(place)[-1] == ("stable_up", None))
    place.wait_for("version 2", lambda: place.ask() == (200, "2"))


def test_a_canary_beside_a_dead_stable_keeps_its_users_and_walks_its_step_again(place: Any, traffic: Any) -> None:
    in_service(place)
    third = place.register(SLOW_STEP, voice="v3")
    place.approve(third)
    place.ask_as_users()
    place.start_rollout(third)
    traffic.start()
    place.wait_for("traffic on the canary", lambda: "3" in traffic.versions)
    kill_engine(place, 2)
    place.wait_for("version 1", lambda: "1" in traffic.versions)
    split = place.split()
    assert (split.stable, split.stands_in_for, split.canary, split.canary_percent) == (1, 2, 3, 50)
    place.wait_for("the hold", lambda: "holds: stable is down" in place.rollout()["reason"])
    so_far = len(traffic.versions)
    place.wait_for("more answers", lambda: {"1", "3"} <= set(traffic.versions[so_far:]))
    let_start(place)
    again = "walked again: stable was down"
    place.wait_for("the step again", lambda: again in place.rollout()["reason"])
    assert (place.split().stable, place.split().canary, place.split().canary_percent) == (2, 3, 50)
    assert place.rollout()["attempt"] == 2
    place.roll_back()
    traffic.stop()
    with Journal.open(place.site.journal) as journal:
        journal.verify()
        steps = [e.body["weight_percent"] for e in journal.entries("demo", kinds=("canary_step",))]
    assert steps == [50, 50]


def test_the_next_version_stands_in_when_the_first_one_dies_too(place: Any) -> None:
    in_service(place, 3)
    kill_engine(place, 3)
    place.wait_for("version 2", lambda: place.ask() == (200, "2"))
    kill_engine(place, 2)
    place.wait_for("version 1", lambda: place.split().stable == 1)
    assert place.ask() == (200, "1")
    place.wait_for("version 2's death to be seen", lambda: place.split().versions[2].endpoint is None)
    place.wait_for("version 2's engine again", lambda: place.split().versions[2].endpoint is not None)
    place.status()  # the host's look, which wrote that, is over
    assert place.split().stable == 1, "users stay with the version that stands in while it answers"
    place.wait_for("both entries", lambda: entries(place) == [("stable_down", 2), ("stable_down", 1)])
