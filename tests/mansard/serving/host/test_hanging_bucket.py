"""The store's bucket accepts and never answers while the host serves: nobody waits for it who need not."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mansard.errors import MansardError
from mansard.release.journal import Journal
from mansard.site import load_site
from mansard.store.store import Store
from tests.mansard.s3_server import environment, make_bucket, s3_process

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[4]
LIMITS = {"max_error_excess": 0.02, "latency_tolerance": 50.0, "output_tolerance": 2.0}
LONG = {"steps": [{"weight_percent": 50, "bake_seconds": 600, "min_requests": 10, "deadline_seconds": 1200}], **LIMITS}
SHORT = {"steps": [{"weight_percent": 50, "bake_seconds": 0.2, "min_requests": 10, "deadline_seconds": 90}], **LIMITS}
URL = "s3://models/mansard"


@pytest.fixture
def bucket(place: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator["subprocess.Popen[bytes]"]:
    """The process of the server that holds the place's store; it runs on when the test ends."""
    with s3_process() as (url, process):
        for name, value in environment(url).items():
            monkeypatch.setenv(name, value)
        make_bucket(url, "models")
        place.site.path.write_text(json.dumps({**json.loads(place.site.path.read_text()), "store": URL}))
        place.site = load_site(place.site.path)
        place.store = Store.of(place.site)
        yield process
        process.send_signal(signal.SIGCONT)


def command(place: Any, *words: str) -> "subprocess.CompletedProcess[str]":
    whole = [sys.executable, "-m", "flows.cli", *words, "--site", str(place.site.path)]
    variables = {**os.environ, "MANSARD_PERSON": "otto"}
    return subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, env=variables, timeout=60)


def test_a_canary_keeps_its_lease_and_is_judged_on_while_the_bucket_hangs(
    place: Any, bucket: "subprocess.Popen[bytes]", traffic: Any
) -> None:
    in_service(place)
    second = place.register(LONG, voice="b")
    traffic.start()
    place.approve(second)
    place.start_rollout(second)
    place.wait_for("traffic on the canary", lambda: "2" in traffic.versions)
    bucket.send_signal(signal.SIGSTOP)
    lease = place.split().lease_counter
    body = {"model": "demo", "artifact": "ab" * 32, "serve": {}, "wait": True}
    with pytest.raises(MansardError, match=f"{URL}: no answer to a "):  # in a thread, as long as a request may last
        place.client.call("POST", "/engines", body, timeout_seconds=60)
    place.wait_for("a dozen renewals", lambda: place.split().lease_counter >= lease + 12)
    asked = len(traffic.versions)
    place.wait_for("users on the canary", lambda: "2" in traffic.versions[asked:])
    assert (place.rollout()["state"], place.split().canary) == ("canary", 2)
    done = command(place, "rollback", "--why", "night", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["action"] == "abort"
    traffic.stop()
    assert set(traffic.statuses) == {200}


@pytest.mark.parametrize("words", [("rollback",), ("rollback", "--hard")])
def test_a_rollback_through_the_host_moves_and_warns_that_the_bucket_did_not_answer(
    place: Any, bucket: "subprocess.Popen[bytes]", traffic: Any, words: tuple[str, ...]
) -> None:
    in_service(place)
    second = place.register(SHORT, voice="b")
    traffic.start()
    assert place.release(second)["state"] == "promoted"
    traffic.stop()
    third = place.register(SHORT, voice="c")
    place.approve(third)
    place.wait_for("version 1 in the split", lambda: place.split().versions[1].endpoint)
    bucket.send_signal(signal.SIGSTOP)
    with pytest.raises(MansardError, match=f"{URL}: no answer to a "):
        place.client.call("POST", "/rollouts", {"model": "demo", "version": third, "who": "ada", "why": ""}, 60)
    done = command(place, *words, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["changed"], told["stable"]) == (True, 1)
    assert f"version 1: {URL}: no answer in 2 s, so its artifact was not checked" in told["warnings"]
    assert place.ask() == (200, "1")
    assert "host: ready" in command(place, "status").stdout
    bucket.send_signal(signal.SIGCONT)


def test_the_host_answers_while_its_first_look_asks_the_silent_bucket_for_a_place(
    place: Any, bucket: "subprocess.Popen[bytes]"
) -> None:
    tree = json.loads(place.site.path.read_text())
    place.site.path.write_text(json.dumps({**tree, "engine": {**tree["engine"], "branch_slots": 1}}))
    place.site = load_site(place.site.path)
    fingerprint = place.store.put_files({"fingerprint.json": b"{}"})
    version = place.register(fingerprint=fingerprint)
    with Journal.open(place.site.journal) as journal:
        journal.start_rollout("demo", version, "ada", "", journal.pointers("demo"))
        journal.promote("demo", version, "host", "", journal.pointers("demo"))
    bucket.send_signal(signal.SIGSTOP)
    place.start_host()  # until /status answers, which it did only after the look
    assert place.status()["state"] == "starting"
    place.wait_for("its end", lambda: place.status()["state"] == "ready")
    bucket.send_signal(signal.SIGCONT)


def in_service(place: Any) -> None:
    place.start_host()
    place.start_router()
    assert place.release(place.register())["state"] == "promoted"
    place.wait_for("an answer of version 1", lambda: place.ask() == (200, "1"))
