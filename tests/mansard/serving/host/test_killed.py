"""kill -9 of the host, and of the router, at every journaled point of rollouts and rollbacks, on real processes.

Afterwards, each time: the rollout ends as it would have, pointer and split agree, every version has one engine and no
process is left over, nothing was deployed twice, the journal verifies, and no user saw anything.
"""

import contextlib
import signal
from pathlib import Path
from typing import Any

import pytest

from mansard.errors import MansardError
from mansard.release.journal import Journal
from mansard.serving.process import group_of, with_output_below

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("host_killed_at.py")
LIMITS = {"max_error_excess": 0.02, "latency_tolerance": 50.0, "output_tolerance": 2.0}
WALK = {
    "steps": [
        {"weight_percent": 50, "bake_seconds": 0.2, "min_requests": 10, "deadline_seconds": 300},
        {"weight_percent": 100, "bake_seconds": 0.2, "min_requests": 10, "deadline_seconds": 300},
    ],
    **LIMITS,
}
LONG = {"steps": [{"weight_percent": 50, "bake_seconds": 600, "min_requests": 10, "deadline_seconds": 900}], **LIMITS}
POINTS = [("rollout_started", 1), ("canary_step", 1), ("canary_step", 2), ("promoted", 1)]
BACK = [("aborted", 1), ("rolled_back", 1)]


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(("kind", "nth"), POINTS)
def test_a_host_killed_in_a_rollout_is_followed_by_one_that_ends_it(
    place: Any, traffic: Any, kind: str, nth: int, moment: str
) -> None:
    second = in_service_under(place, traffic, WALK, kind, nth, moment)
    with contextlib.suppress(MansardError):  # nobody answers: it was killed
        place.start_rollout(second)
    place.host.wait(120)
    place.start_host()
    if pointers(place).canary is None and pointers(place).stable == 1:
        assert (kind, moment) == ("rollout_started", "before")
        place.start_rollout(second)
    assert place.wait_for_end()["state"] == "promoted", place.rollout()["reason"]
    agree(place, traffic, stable=2, engines={1, 2})


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(("kind", "nth"), BACK)
def test_a_host_killed_in_a_retreat_is_followed_by_one_that_ends_it(
    place: Any, traffic: Any, kind: str, nth: int, moment: str
) -> None:
    second = in_service_under(place, traffic, LONG if kind == "aborted" else WALK, kind, nth, moment)
    place.start_rollout(second)
    state = "canary" if kind == "aborted" else "promoted"
    place.wait_for("the rollout", lambda: place.rollout()["state"] == state)
    with contextlib.suppress(MansardError):
        place.roll_back()
    place.host.wait(120)
    place.start_host()
    if moment == "before":
        assert pointers(place).canary == 2 or pointers(place).stable == 2
        assert place.roll_back()["changed"]
    agree(place, traffic, stable=1, engines={1})


@pytest.mark.parametrize(("kind", "nth"), [*POINTS, *BACK])
def test_a_router_killed_at_a_move_takes_it_up_when_it_is_back(place: Any, traffic: Any, kind: str, nth: int) -> None:
    second = in_service_under(place, traffic, LONG if kind == "aborted" else WALK, kind, nth, "after", "router")
    place.start_rollout(second)
    if kind in ("aborted", "rolled_back"):
        state = "canary" if kind == "aborted" else "promoted"
        place.wait_for("the rollout", lambda: place.rollout()["state"] == state)
        place.roll_back()
    place.router.wait(120)
    place.start_router()
    assert place.wait_for_end()["state"] == ("aborted" if kind == "aborted" else "promoted")
    stable = 1 if kind in ("aborted", "rolled_back") else 2
    agree(place, traffic, stable, engines={1, 2} if stable == 2 else {1}, is_router_killed=True)


def in_service_under(
    place: Any, traffic: Any, release: dict[str, Any], kind: str, nth: int, moment: str, victim: str = "host"
) -> int:
    """Version 1 in service with users, version 2 approved, and the host that strikes in charge."""
    place.start_host()
    place.start_router()
    assert place.release(place.register())["state"] == "promoted"
    second = place.register(release, voice="b")
    place.approve(second)
    place.end_host(signal.SIGHUP)
    place.start_host_script(SCRIPT, kind, nth, moment, place.router.pid if victim == "router" else 0)
    traffic.start()
    place.wait_for("users on version 1", lambda: traffic.versions.count("1") > 150)
    return int(second)


def pointers(place: Any) -> Any:
    with Journal.open(place.site.journal) as journal:
        return journal.pointers("demo")


def agree(place: Any, traffic: Any, stable: int, engines: set[int], is_router_killed: bool = False) -> None:
    """Pointer, split, router, engines and users tell the same."""
    at = pointers(place)
    assert (at.stable, at.canary) == (stable, None)
    place.wait_for("the split", lambda: (place.split().stable, place.split().canary) == (stable, None))
    place.wait_for("its endpoint", lambda: place.split().versions[stable].endpoint)
    place.wait_for("the router", lambda: place.ask() == (200, str(stable)))
    traffic.stop()
    if not is_router_killed:
        assert set(traffic.statuses) == {200}
    with Journal.open(place.site.journal) as journal:
        journal.verify()
        promotions = [e.version for e in journal.moves("demo") if e.kind == "promoted"]
    assert len(promotions) == len(set(promotions)), "deployed twice"
    pids = {place.engine_of(version)["pid"] for version in engines}
    ours = {engine["pid"] for engine in place.status()["engines"]}
    assert pids <= ours
    assert len(ours) <= 2
    running = {group_of(process) for process in with_output_below(place.site.logs / "engines")} - {None}
    assert running == ours, "a process that no engine of this host is"
