"""A place with version 1 in service, releases of one step, and what the tests of rollouts and rollbacks ask it."""

import itertools
from typing import Any

from mansard.serving.client import router_observations

LIMITS = {"max_error_excess": 0.02, "latency_tolerance": 50.0, "output_tolerance": 2.0}
SLOW_RELEASE = {
    "steps": [{"weight_percent": 50, "bake_seconds": 600, "min_requests": 10, "deadline_seconds": 1200}],
    **LIMITS,
}
ONE_STEP = {
    "steps": [{"weight_percent": 100, "bake_seconds": 0, "min_requests": 1, "deadline_seconds": 90}],
    **LIMITS,
}


def release_to_all(place: Any, version: int) -> str:
    """A release in one step with just enough traffic: 40 users before and after; how it ended."""
    users = itertools.cycle(f"user-{number}" for number in range(40))
    for _ in range(40):
        place.ask(next(users))
    place.approve(version)
    place.start_rollout(version)
    ended = place.wait_for(
        "the end",
        lambda: place.ask(next(users)) and (s := place.rollout()["state"]) in ("promoted", "aborted") and s,
    )
    return str(ended)


def router_in_flight(place: Any, version: str) -> int:
    """What the router has under way at a version."""
    for seen in router_observations(place.site):
        return int(seen["models"]["demo"]["versions"].get(version, {"in_flight": 0})["in_flight"])
    return 0


def in_service(place: Any, **behaviour: Any) -> None:
    """Host, router, and version 1 stable and answering."""
    place.start_host()
    place.start_router()
    assert place.release(place.register(**behaviour))["state"] == "promoted"
    place.wait_for("an answer of version 1", lambda: place.ask() == (200, "1"))


def slow_canary_under_traffic(place: Any, traffic: Any) -> int:
    """Version 2 as the canary of a long step, with users on it."""
    in_service(place)
    second = int(place.register(SLOW_RELEASE, voice="b"))
    traffic.start()
    place.approve(second)
    place.start_rollout(second)
    place.wait_for("traffic on the canary", lambda: "2" in traffic.versions)
    return second
