"""The host rolls back: in a rollout, to a cold version, hard or after the running streams."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mansard.serving.process import identify
from tests.mansard.serving.host.served_place import (
    ONE_STEP,
    in_service,
    release_to_all,
    router_in_flight,
    slow_canary_under_traffic,
)

pytestmark = pytest.mark.slow


def test_rollback_ends_a_rollout_and_leaves_stable(place: Any, traffic: Any) -> None:
    slow_canary_under_traffic(place, traffic)
    done = place.roll_back()
    assert (done["changed"], done["stable"], done["canary"]) == (True, 1, None)
    assert place.rollout()["state"] == "aborted"
    assert {place.ask(f"u{i}") for i in range(20)} == {(200, "1")}
    assert place.roll_back()["changed"] is False
    traffic.stop()
    assert set(traffic.statuses) == {200}


def test_rollback_starts_a_cold_previous_first(place: Any) -> None:
    in_service(place)
    assert release_to_all(place, place.register(ONE_STEP, voice="b")) == "promoted"
    old = place.engine_of(1)["pid"]
    os.kill(old, signal.SIGKILL)
    place.wait_for("its death to be seen", lambda: place.split().versions[1].endpoint is None)
    back = place.roll_back()
    assert (back["changed"], back["stable"], back["warnings"]) == (True, 1, [])
    assert place.engine_of(1)["pid"] != old
    assert place.ask() == (200, "1")


def test_a_hard_rollback_does_not_wait_for_a_cold_previous(place: Any) -> None:
    in_service(place)
    assert release_to_all(place, place.register(ONE_STEP, voice="b")) == "promoted"
    os.kill(place.engine_of(1)["pid"], signal.SIGKILL)
    place.wait_for("its death to be seen", lambda: place.split().versions[1].endpoint is None)
    back = place.roll_back(hard=True)
    assert (back["changed"], back["stable"], back["started_seconds"]) == (True, 1, 0.0)
    place.wait_for("answers of version 1", lambda: place.ask() == (200, "1"))


def test_a_hard_rollback_ends_running_streams_with_an_error_event(place: Any) -> None:
    in_service(place)
    assert release_to_all(place, place.register(ONE_STEP, voice="b", seconds_per_token=0.01)) == "promoted"
    with ThreadPoolExecutor() as threads:
        stream = threads.submit(place.ask_long)
        place.wait_for("the stream", lambda: router_in_flight(place, "2"))
        old = place.engine_of(2)["pid"]
        back = place.roll_back(hard=True)
        status, version, text = stream.result(60)
    assert (back["stable"], back["warnings"]) == (1, [])
    assert (status, version) == (599, "2")  # 599: not whole
    assert b'"error"' in text
    assert b"version 2 broke off this answer" in text
    place.wait_for("the engine's end", lambda: identify(old) is None)
    assert place.ask() == (200, "1")


def test_a_graceful_rollback_lets_running_streams_end(place: Any) -> None:
    in_service(place)
    assert release_to_all(place, place.register(ONE_STEP, voice="b", seconds_per_token=0.01)) == "promoted"
    with ThreadPoolExecutor() as threads:
        stream = threads.submit(place.ask_long)
        place.wait_for("the stream", lambda: router_in_flight(place, "2"))
        assert place.roll_back()["stable"] == 1
        assert place.ask() == (200, "1")
        status, version, _ = stream.result(60)
    assert (status, version) == (200, "2")


def test_a_rollback_to_a_version_that_answers_otherwise_now_warns_and_is_made(place: Any) -> None:
    in_service(place, babble_once=str(place.home / "begun"))
    assert release_to_all(place, place.register(ONE_STEP, voice="b")) == "promoted"
    os.kill(place.engine_of(1)["pid"], signal.SIGKILL)
    place.wait_for("its death to be seen", lambda: place.split().versions[1].endpoint is None)
    back = place.roll_back()
    assert back["stable"] == 1
    assert any("fingerprint" in warning for warning in back["warnings"]), back
