"""The host's whole walk with HAProxy as the data plane: nothing in the controller knows the difference."""

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from mansard.errors import MansardError
from mansard.release.journal import Journal
from mansard.serving.client import HostClient
from mansard.serving.haproxy.runtime import Runtime
from mansard.site import load_site

HAPROXY = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(HAPROXY is None, reason="left out: HAProxy is not installed (apt-get install haproxy)"),
]


@pytest.fixture
def behind_haproxy(place: Any) -> Iterator[Any]:
    """The place with HAProxy where its router workers would be."""
    path = place.site.path
    router = {"plane": "haproxy", "show_version": "always"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "router": router}))
    place.site = load_site(path)
    driver = place._start("router.log", "-m", "mansard.serving.haproxy.driver", "--site", str(path))
    admin = HostClient(place.site.run / "router-0.sock")
    place.wait_for("HAProxy's driver", lambda: place._answers(admin, "/observations"))
    try:
        yield place
    finally:
        driver.kill()  # first, because it would start HAProxy again
        driver.wait()
        with contextlib.suppress(MansardError, ProcessLookupError):
            os.kill(Runtime(place.site.run / "haproxy.sock", place.home, place.home).pid(), signal.SIGKILL)


def test_a_good_canary_is_promoted_rolled_back_and_a_failing_one_aborted(behind_haproxy: Any, traffic: Any) -> None:
    place = behind_haproxy
    place.start_host()
    assert place.release(place.register())["state"] == "promoted"
    traffic.start()
    assert place.release(place.register(voice="good"))["state"] == "promoted"
    place.wait_for("all users on version 2", lambda: place.ask()[1] == "2")
    assert place.roll_back()["stable"] == 1
    bad = place.release(place.register(voice="bad", fail_completions=True, fail_after=20))
    assert bad["state"] == "aborted"
    traffic.stop()
    place.wait_for("all users on version 1", lambda: place.ask() == (200, "1"))
    wrong = [s for s in traffic.statuses if s != 200]
    assert not wrong, (len(wrong), len(traffic.statuses))
    assert {"1", "2"} <= set(traffic.versions)


def test_previous_serves_the_users_of_a_dead_stable_until_it_is_back(behind_haproxy: Any, traffic: Any) -> None:
    place = behind_haproxy
    place.start_host()
    stuck = place.home / "stuck"
    for behaviour in ({"voice": "one"}, {"voice": "two", "start_once": str(stuck)}):
        version = place.register(**behaviour)
        with Journal.open(place.site.journal) as journal:  # what a rollout would have written
            journal.start_rollout("demo", version, "ada", "", journal.pointers("demo"))
            journal.promote("demo", version, "host", "", journal.pointers("demo"))
        place.wait_for("its answer", lambda version=version: place.ask() == (200, str(version)))
    place.wait_for("both engines", lambda: all(v.endpoint for v in place.split().versions.values()))
    traffic.start()
    os.kill(place.engine_of(2)["pid"], signal.SIGKILL)
    place.wait_for("version 1", lambda: traffic.versions[-1] == "1")
    num_lost = len([status for status in traffic.statuses if status != 200])
    stuck.unlink()
    place.wait_for("version 2", lambda: traffic.versions[-1] == "2")
    traffic.stop()
    assert len([status for status in traffic.statuses if status != 200]) == num_lost
    assert (place.split().stable, place.split().stands_in_for) == (2, None)


def test_a_canary_that_is_slow_only_to_its_first_token_is_aborted_by_the_analysis(
    behind_haproxy: Any, traffic: Any
) -> None:
    place = behind_haproxy
    place.start_host()
    pace = {"seconds_per_token": 0.05}
    assert place.release(place.register(**pace))["state"] == "promoted"
    traffic.start(8)
    step = {"weight_percent": 50, "bake_seconds": 60, "min_requests": 10, "deadline_seconds": 90}
    release = {"steps": [step], "max_error_excess": 0.02, "latency_tolerance": 1.5, "output_tolerance": 2.0}
    lax = {"first_token_ms_p50": 10.0, "per_token_ms_p50": 10.0, "request_ms_p50": 100.0}
    slow = place.release(place.register(release, ratios=lax, voice="good", seconds_to_first_token=0.5, **pace))
    assert slow["state"] == "aborted"
    assert "first_token: " in slow["reason"] and "fail" in slow["reason"], slow["reason"]
    assert "the engines' own means: first_token 0." in slow["reason"], slow["reason"]
    assert "errors: " not in slow["reason"] and "request: " not in slow["reason"], slow["reason"]


def test_a_canary_that_hangs_is_aborted_by_the_age_of_what_it_never_answers(behind_haproxy: Any, traffic: Any) -> None:
    place = behind_haproxy
    place.start_host()
    assert place.release(place.register())["state"] == "promoted"
    step = {"weight_percent": 50, "bake_seconds": 60, "min_requests": 10, "deadline_seconds": 90}
    release = {"steps": [step], "max_error_excess": 0.02, "latency_tolerance": 5.0, "output_tolerance": 2.0}
    traffic.start(80)
    second = place.register(release, voice="good", hang_after=12)
    engine = place.engine_of(second)["pid"]
    hung = place.release(second)
    os.kill(engine, signal.SIGKILL)  # else its users would wait until it is ended
    assert hung["state"] == "aborted"
    assert "request: " in hung["reason"], hung["reason"]
