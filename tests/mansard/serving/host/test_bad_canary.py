"""The host ends a rollout whose canary dies, fails, hangs, babbles, is slow or is never asked."""

import os
import signal
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from mansard.errors import NotAllowed
from mansard.release.journal import Journal
from tests.mansard.serving.host.served_place import SLOW_RELEASE, in_service, slow_canary_under_traffic

pytestmark = pytest.mark.slow


def test_killing_the_canarys_engine_aborts_at_once_and_users_see_nothing(place: Any, traffic: Any) -> None:
    second = slow_canary_under_traffic(place, traffic)
    os.kill(place.engine_of(2)["pid"], signal.SIGKILL)
    ended = place.wait_for_end()
    assert ended["state"] == "aborted"
    assert "died" in ended["reason"] or "consecutive" in ended["reason"]
    assert (place.split().stable, place.split().canary) == (1, None)
    traffic.stop()
    assert traffic.statuses.count(200) >= len(traffic.statuses) - 2  # a stream that the dead engine had begun
    with pytest.raises(NotAllowed, match="aborted"):
        place.start_rollout(second)


def test_a_canary_that_answers_500_is_aborted_and_its_users_are_rescued(place: Any, traffic: Any) -> None:
    in_service(place)
    # Its own fingerprint, its warm requests and its first users get answers, then it fails.
    second = place.register(SLOW_RELEASE, voice="b", fail_completions=True, fail_after=12)
    traffic.start()
    ended = place.release(second)
    assert ended["state"] == "aborted"
    traffic.stop()
    assert set(traffic.statuses) == {200}


def test_another_fingerprint_aborts_before_any_traffic(place: Any, traffic: Any) -> None:
    in_service(place)
    with Journal.open(place.site.journal) as journal:
        of_first = journal.registration("demo", 1).fingerprint
    second = place.register(SLOW_RELEASE, fingerprint=of_first, voice="b")
    traffic.start()
    ended = place.release(second)
    traffic.stop()
    assert (ended["state"], ended["weight_percent"]) == ("aborted", 0)
    assert "fingerprint" in ended["reason"]
    assert set(traffic.versions) == {"1"}


def test_low_traffic_ends_inconclusive(place: Any) -> None:
    in_service(place)
    place.ask_as_users()
    steps = [{"weight_percent": 50, "bake_seconds": 0, "min_requests": 5, "deadline_seconds": 2}]
    ended = place.release(place.register({**SLOW_RELEASE, "steps": steps}, voice="b"))
    assert (ended["state"], place.split().stable) == ("aborted", 1)
    assert "inconclusive" in ended["reason"]


def test_a_canary_that_died_with_its_host_is_aborted_by_the_next_one(place: Any, traffic: Any) -> None:
    in_service(place)
    second = place.register(SLOW_RELEASE, voice="b", start_once=str(place.home / "started"))
    traffic.start()
    place.approve(second)
    place.start_rollout(second)
    place.wait_for("traffic on the canary", lambda: "2" in traffic.versions)
    pid = place.engine_of(2)["pid"]
    place.end_host(signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    place.start_host()
    ended = place.wait_for_end()
    assert ended["state"] == "aborted"
    assert (place.split().stable, place.split().canary) == (1, None)
    traffic.stop()
    assert traffic.statuses.count(200) >= len(traffic.statuses) - 2  # streams that the killed engine had begun


def test_a_canary_slower_than_evaluation_measured_is_aborted(place: Any, traffic: Any) -> None:
    in_service(place)
    limits = {**SLOW_RELEASE, "latency_tolerance": 3.0}
    second = place.register(limits, voice="b", seconds_per_token=0.2)
    traffic.start(4)
    ended = place.release(second)
    traffic.stop()
    assert ended["state"] == "aborted"
    assert "limit 3.00x" in ended["reason"]
    assert set(traffic.statuses) == {200}


def test_a_canary_that_hangs_is_aborted_by_the_age_of_what_it_never_answers(place: Any, traffic: Any) -> None:
    in_service(place)
    second = place.register({**SLOW_RELEASE, "latency_tolerance": 5.0}, voice="b", hang_after=12)
    traffic.start(60)
    ended = place.release(second)
    assert ended["state"] == "aborted"
    assert "request: " in ended["reason"] or "probe failed" in ended["reason"]
    traffic.stop()  # who hung was rescued by stable when the engine was ended
    assert traffic.statuses.count(200) >= len(traffic.statuses) - 60  # streams that had begun end with an error event
    place.wait_for("the bad engine's end", lambda: len(place.status()["engines"]) == 1)


def test_a_canary_that_hangs_before_few_users_is_aborted_by_its_engines_own_account(place: Any, traffic: Any) -> None:
    place.start_host_script(Path(__file__).parent / "host_impatient.py", 5)
    place.start_router()
    place.release(place.register())
    second = place.register(SLOW_RELEASE, voice="b", hang_after=12)
    engine = place.engine_of(second)["pid"]
    traffic.start(2)
    ended = place.release(second)
    os.kill(engine, signal.SIGKILL)
    assert ended["state"] == "aborted"
    assert "its engine hangs: requests in flight, and no token, prompt or memory moved for" in ended["reason"]


def test_guard_prompts_that_a_hung_engine_never_answers_do_not_hold_the_host(place: Any) -> None:
    in_service(place)
    place.ask_as_users()
    second = place.register(SLOW_RELEASE, voice="b", hang_after=8)
    engine = place.engine_of(second)
    place.approve(second)
    place.start_rollout(second)

    def hangs() -> bool:
        with urllib.request.urlopen(f"{engine['endpoint']}/metrics") as answer:
            lines = answer.read().decode().split("\n")
        return "fake:completions 9.0" in lines

    place.wait_for("a guard prompt that is never answered", hangs)
    place.end_host(signal.SIGHUP)  # within its deadline: the question's own is longer
    os.kill(engine["pid"], signal.SIGKILL)


def test_a_canary_that_begins_to_babble_is_aborted(place: Any, traffic: Any) -> None:
    in_service(place)
    second = place.register(SLOW_RELEASE, voice="b", babble_after=60)
    traffic.start()
    ended = place.release(second)
    traffic.stop()
    assert ended["state"] == "aborted"
    assert "answers to the guard prompts changed" in ended["reason"]
