"""The journal's server accepts and never answers while the host serves: it is stopped, or the network swallows."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mansard.errors import JournalDown, MansardError
from mansard.release.journal import Journal
from mansard.site import load_site
from tests.mansard.swallowing_proxy import SwallowingProxy, swallowing_proxy

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[4]
SLOW_STEP = {
    "steps": [{"weight_percent": 50, "bake_seconds": 600, "min_requests": 10, "deadline_seconds": 1200}],
    "max_error_excess": 0.02, "latency_tolerance": 50.0, "output_tolerance": 2.0,
}  # fmt: skip


def command(place: Any, *words: str) -> "subprocess.CompletedProcess[str]":
    whole = [sys.executable, "-m", "flows.cli", *words, "--site", str(place.site.path)]
    variables = {**os.environ, "MANSARD_PERSON": "otto", "PYTHONPATH": str(ROOT)}
    return subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, env=variables, timeout=60)


@pytest.fixture
def proxy(place: Any, postgres: Any) -> Iterator[SwallowingProxy]:
    """Between the site and its journal's server; both answer again when the test ends."""
    with swallowing_proxy(postgres.socket) as proxy:
        tree = json.loads(place.site.path.read_text())
        url = proxy.url_of(postgres.new_journal(), postgres.folder)
        place.site.path.write_text(json.dumps({**tree, "journal": url}))
        place.site = load_site(place.site.path)
        try:
            yield proxy
        finally:
            postgres.thaw()
            proxy.pass_on()
            if place.host is not None:
                place.wait_for("the journal", lambda: answers(place, "/status"))
                place.close()
                place.host = None
                place.site.path.write_text(json.dumps(tree))  # the server may be gone before the place


def answers(place: Any, path: str) -> bool:
    try:
        place.client.call("GET", path, timeout_seconds=30)
    except MansardError:
        return False
    return True


def promoted(place: Any, *versions: int) -> None:
    """What rollouts would have written."""
    with Journal.open(place.site.journal) as journal:
        for version in versions:
            journal.start_rollout("demo", version, "ada", "", journal.pointers("demo"))
            journal.promote("demo", version, "host", "", journal.pointers("demo"))
        entries = len(journal.entries())
    place.wait_for("the split", lambda: place.site.split_file.exists() and all(split_endpoints(place, len(versions))))
    place.wait_for("the memory", lambda: json.loads(place.site.memory_file.read_bytes())["sequence"] >= entries)


def split_endpoints(place: Any, num_versions: int) -> list[str | None]:
    try:
        found = [version.endpoint for version in place.split().versions.values()]
    except KeyError:
        return [None]
    return found if len(found) >= num_versions else [None]


def test_a_canary_keeps_its_lease_and_a_rollback_ends_it_while_the_network_swallows(
    place: Any, proxy: SwallowingProxy, traffic: Any
) -> None:
    place.start_host()
    place.start_router()
    promoted(place, place.register())
    place.wait_for("an answer of version 1", lambda: place.ask() == (200, "1"))
    second = place.register(SLOW_STEP, voice="b")
    traffic.start()
    place.approve(second)
    place.start_rollout(second)
    place.wait_for("traffic on the canary", lambda: "2" in traffic.versions)
    with Journal.open(place.site.journal) as journal:
        entries = len(journal.entries())
    place.wait_for("the memory", lambda: json.loads(place.site.memory_file.read_bytes())["sequence"] >= entries)
    proxy.swallow()
    lease = place.split().lease_counter
    with pytest.raises(JournalDown, match="no answer in 2 s"):
        place.status()
    place.wait_for("a dozen renewals", lambda: place.split().lease_counter >= lease + 12)
    num_answers = len(traffic.versions)
    place.wait_for("users on the canary", lambda: "2" in traffic.versions[num_answers:])
    assert place.client.call("GET", "/alive", timeout_seconds=30)["state"] == "ready"
    assert (place.rollout()["state"], place.split().canary) == ("canary", 2)
    ran = command(place, "rollback", "--why", "night", "--json")
    assert ran.returncode == 0, ran.stderr
    answer = json.loads(ran.stdout)
    assert (answer["action"], answer["host"], place.split().canary) == ("abort", "down", None)
    assert "no answer in" in answer["journal"]
    proxy.pass_on()
    place.wait_for("the import", lambda: not place.site.emergency_file.exists())
    ended = place.wait_for_end()
    traffic.stop()
    assert (ended["state"], ended["reason"]) == ("aborted", "aborted by otto: night")
    assert set(traffic.statuses) == {200}
    with Journal.open(place.site.journal) as journal:
        journal.verify()
        assert journal.pointers("demo").canary is None


def test_users_are_moved_and_a_dead_engine_starts_again_while_the_server_is_stopped(
    place: Any, proxy: SwallowingProxy, postgres: Any
) -> None:
    place.start_host()
    place.start_router()
    promoted(place, place.register(), place.register(voice="b"))
    place.wait_for("an answer of version 2", lambda: place.ask() == (200, "2"))
    engine = place.engine_of(1)["pid"]
    postgres.freeze()
    os.kill(engine, 9)
    place.wait_for("its endpoint to leave", lambda: place.split().versions[1].endpoint is None)
    place.wait_for("its next engine", lambda: place.split().versions[1].endpoint is not None)
    ran = command(place, "rollback", "--why", "night", "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["stable"] == 1
    place.wait_for("version 1", lambda: place.ask() == (200, "1"))
    with pytest.raises(JournalDown, match="no answer in"):
        place.client.call("POST", "/rollouts", {"model": "demo", "version": 2, "who": "ada", "why": ""})
    ran = command(place, "approve", "2", "--as", "grace", "--reason", "good")
    assert (ran.returncode, ran.stderr.count("\n"), "no answer in 5 s" in ran.stderr) == (1, 1, True), ran.stderr
    said = command(place, "status")
    assert said.returncode == 0
    assert "journal: DOWN" in said.stdout and "host: runs, but cannot answer" in said.stdout
    postgres.thaw()
    place.wait_for("the import", lambda: not place.site.emergency_file.exists())
    place.wait_for("the host", lambda: answers(place, "/status"))
    place.wait_for("version 1 in the journal", lambda: place.status()["models"]["demo"]["stable"] == 1)
    with Journal.open(place.site.journal) as journal:
        journal.verify()
        assert journal.pointers("demo").stable == 1
