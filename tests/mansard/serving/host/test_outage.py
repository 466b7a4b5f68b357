"""The host runs on while the journal's database is down; people roll back all the same, and the journal hears of it."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mansard.errors import NotAllowed
from mansard.release.journal import Journal
from mansard.serving.client import HostClient
from mansard.serving.process import identify
from mansard.site import load_site

ROOT = Path(__file__).resolve().parents[4]


def command(place: Any, *words: str) -> "subprocess.CompletedProcess[str]":
    whole = [sys.executable, "-m", "flows.cli", *words, "--site", str(place.site.path)]
    return subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "MANSARD_PERSON": "otto"})


SLOW = {
    "steps": [{"weight_percent": 50, "bake_seconds": 600, "min_requests": 10, "deadline_seconds": 1200}],
    "max_error_excess": 0.02,
}


def with_server(place: Any, postgres: Any) -> None:
    tree = json.loads(place.site.path.read_text())
    place.site.path.write_text(json.dumps({**tree, "journal": postgres.new_journal()}))
    place.site = load_site(place.site.path)


def test_a_canary_that_dies_while_the_database_is_down_is_aborted_in_the_journal_later(
    place: Any, traffic: Any, postgres: Any
) -> None:
    with_server(place, postgres)
    place.start_host()
    place.start_router()
    assert place.release(place.register())["state"] == "promoted"
    place.wait_for("an answer", lambda: place.ask() == (200, "1"))
    second = place.register(SLOW, voice="b")
    traffic.start()
    place.approve(second)
    place.start_rollout(second)
    place.wait_for("traffic on the canary", lambda: "2" in traffic.versions)
    place.wait_for("a look", lambda: "errors: " in command(place, "status").stdout)
    said = command(place, "status").stdout
    assert "demo rollout of version 2: step 1 of 1: 50 % of the traffic" in said
    assert "failed; stable " in said and "the engines' own means: first_token " in said
    engine = place.engine_of(second)["pid"]
    postgres.stop()
    try:
        os.kill(engine, signal.SIGKILL)
        log = place.home / "host.log"
        place.wait_for("the controller to notice", lambda: "to be aborted" in log.read_text())
        assert place.host.poll() is None
    finally:
        postgres.start()
    assert place.wait_for_end()["state"] == "aborted"
    assert (place.split().stable, place.split().canary) == (1, None)
    traffic.stop()
    assert traffic.statuses.count(200) >= len(traffic.statuses) - 2  # streams that the killed engine had begun
    with Journal.open(place.site.journal) as journal:
        journal.verify()
        assert journal.entries("demo")[-1].kind == "aborted"


def test_a_key_that_is_revoked_in_the_middle_of_a_rollout_ends_it_at_the_next_move(place: Any, traffic: Any) -> None:
    place.start_host()
    place.start_router()
    assert place.release(place.register())["state"] == "promoted"
    place.wait_for("an answer", lambda: place.ask() == (200, "1"))
    second = place.register(SLOW, voice="b")
    place.approve(second)
    traffic.start()
    with pytest.raises(NotAllowed, match="'mallory' is not one of the people"):
        body = {"model": "demo", "version": second, "who": "mallory", "why": ""}
        place.client.call("POST", "/rollouts", body)
    place.start_rollout(second)
    place.wait_for("traffic on the canary", lambda: "2" in traffic.versions)
    tree = json.loads(place.site.path.read_text())
    tree["people"]["grace"]["revoked"] = "laptop stolen"
    place.site.path.write_text(json.dumps(tree))
    place.end_host(signal.SIGHUP)
    place.start_host()  # takes the walk up with a step, which is a move
    ended = place.wait_for_end()
    traffic.stop()
    assert ended["state"] == "aborted"
    assert "the people of" in ended["reason"] or "revoked" in ended["reason"]
    assert set(traffic.statuses) == {200}
    with Journal.open(place.site.journal) as journal:
        told = journal.entries(kinds=("people_changed",))
    assert told[-1].body["people"]["grace"]["revoked"] == "laptop stolen"


def test_a_rollback_with_host_and_engines_up_and_the_database_down(place: Any, postgres: Any) -> None:
    with_server(place, postgres)
    place.start_host()
    with Journal.open(place.site.journal) as journal:
        for voice in ("a", "b"):
            version = place.register(voice=voice)
            journal.start_rollout("demo", version, "ada", "", journal.pointers("demo"))
            journal.promote("demo", version, "host", "", journal.pointers("demo"))
        entries = len(journal.entries())

    def is_in_service() -> bool:
        split = json.loads(place.site.split_file.read_bytes())["models"].get("demo", {})
        endpoints = [v["endpoint"] for v in split.get("versions", {}).values()]
        return split.get("stable") == 2 and len(endpoints) == 2 and None not in endpoints

    place.wait_for("both engines in the split", lambda: place.site.split_file.exists() and is_in_service())
    place.wait_for("the memory", lambda: json.loads(place.site.memory_file.read_bytes())["sequence"] >= entries)
    engines = {e["pid"] for e in place.status()["engines"]}
    postgres.stop()
    try:
        said = command(place, "status")
        assert said.returncode == 0 and "journal: DOWN" in said.stdout
        assert "host: runs, but cannot answer" in said.stdout
        done = command(place, "rollback", "--why", "night")
        assert done.returncode == 0, done.stderr
        assert "version 1 is stable again, was 2" in done.stdout
        assert place.split().stable == 1
        assert place.host.poll() is None
    finally:
        postgres.start()
    place.wait_for("the import", lambda: not place.site.emergency_file.exists())
    place.wait_for("the host", lambda: place.status()["models"]["demo"]["stable"] == 1)
    with Journal.open(place.site.journal) as journal:
        journal.verify()
        assert journal.entries()[-1].body["facts"]["emergency"]["who"] == "otto"
        assert journal.term() >= json.loads(place.site.split_file.read_bytes())["term"]
    assert {e["pid"] for e in place.status()["engines"]} == engines
    assert (place.split().stable, place.split().canary) == (1, None)


@pytest.mark.parametrize("is_journal_there", [True, False])
def test_a_hard_rollback_without_the_host_ends_running_streams_with_an_error_event(
    place: Any, is_journal_there: bool
) -> None:
    place.start_host()
    place.start_router()
    assert place.release(place.register())["state"] == "promoted"
    place.wait_for("an answer", lambda: place.ask() == (200, "1"))
    second = place.register(voice="b", seconds_per_token=0.05)
    engines = [place.engine_of(version)["pid"] for version in (1, second)]
    with Journal.open(place.site.journal) as journal:  # a rollout needs traffic; this is what it would have written
        journal.start_rollout("demo", second, "ada", "", journal.pointers("demo"))
        journal.promote("demo", second, "host", "", journal.pointers("demo"))
        entries = len(journal.entries())
    place.wait_for("version 2", lambda: place.ask() == (200, "2"))
    place.wait_for("the memory", lambda: json.loads(place.site.memory_file.read_bytes())["sequence"] >= entries)
    place.end_host(signal.SIGKILL)
    if not is_journal_there:
        for path in place.site.home.glob("journal.sqlite3*"):
            path.rename(place.home / f"aside-{path.name}")
        (place.site.home / "journal.sqlite3").mkdir()
    with ThreadPoolExecutor() as threads:
        stream = threads.submit(place.ask_long)
        place.wait_for("the stream", lambda: in_flight(place, second))
        done = command(place, "rollback", "--hard", "--json")
        status, version, text = stream.result(60)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["stable"], told["host"]) == (1, "down")
    assert (status, version) == (599, "2")  # 599: not whole
    assert b"version 2 broke off this answer" in text
    assert [identify(pid) is None for pid in engines] == [False, True]
    assert place.ask() == (200, "1")
    if not is_journal_there:
        (place.site.home / "journal.sqlite3").rmdir()
        for path in place.home.glob("aside-*"):
            path.rename(place.site.home / path.name.removeprefix("aside-"))


def in_flight(place: Any, version: int) -> int:
    seen = HostClient(place.site.run / "router-0.sock").call("GET", "/observations")
    return int(seen["models"]["demo"]["versions"].get(str(version), {"in_flight": 0})["in_flight"])
