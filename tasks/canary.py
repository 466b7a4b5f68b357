"""A rollout that the host walks: followed here, shown in terminal and Prefect, reported to MLflow."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mansard.digest import digest_json
from mansard.errors import MansardError
from mansard.serving.client import HostDown
from mansard.site import Site
from tasks import policy, tracking
from tasks.derivation import PrefectProgress
from tasks.serving import rollout_state
from tasks.terminal import say

OVER = ("promoted", "aborted")


@dataclass(frozen=True, slots=True)
class Stop:
    """One state of a walk as it was first seen, `seconds` after the start."""

    seconds: float
    state: str
    step: int
    weight_percent: int


@dataclass(frozen=True, slots=True)
class Walk:
    """A rollout that is over."""

    version: int
    state: str
    reason: str
    seconds: float
    stops: tuple[Stop, ...]


@policy.once
def follow_rollout(site: Site, model_name: str, version: int, clock: Callable[[], float] = time.monotonic) -> Walk:
    """Look on until the rollout is promoted or aborted. Interrupting this does not end the rollout.

    A host that is down is waited for: the next one walks on. HostDown when none came in HOST_AWAY_SECONDS.
    """
    begun = clock()
    watch = _Watch(site, model_name, clock)
    show = PrefectProgress(f"release {version}")
    stops: list[Stop] = []
    try:
        while True:
            now = watch.look()
            stop = Stop(round(clock() - begun, 1), now["state"], now["step"], now["weight_percent"])
            if not stops or (stop.state, stop.step) != (stops[-1].state, stops[-1].step):
                stops.append(stop)
                say(f"version {version}: {_words(now)}")
            steps = now["steps"] or 1
            done = steps if stop.state in OVER else max(stop.step - 1, 0)
            show("release", {"done": done, "total": steps, "unit": "steps"})
            if stop.state in OVER and now["version"] == version:
                return Walk(version, stop.state, now["reason"], stop.seconds, tuple(stops))
            time.sleep(policy.ROLLOUT_POLL_SECONDS)
    except KeyboardInterrupt:
        say(f"the rollout of version {version} goes on without this command; end it with: mansard rollback")
        raise


@policy.once
def report_rollout(site: Site, model_name: str, walk: Walk, who: str) -> None:
    """The walk as a run in MLflow. What happened has happened: without MLflow this says so and goes on."""
    key = digest_json({"verb": "release", "version": walk.version, "stops": [str(s) for s in walk.stops], "who": who})
    tags = {"mansard_version": str(walk.version), "mansard_rollout": walk.state, "mansard_reason": walk.reason[:4000]}
    try:
        run = tracking.open_upgrade(model_name, f"release {walk.version}", key, {**tags, "mansard_operator": who})
        tracking.log_series(run, {"weight_percent": [(int(s.seconds), s.weight_percent) for s in walk.stops]})
        tracking.close_upgrade(run, "FINISHED")
    except MansardError as error:
        say(f"the rollout is over, but MLflow does not show it: {error}")


@dataclass(slots=True)
class _Watch:
    """Asks the host, also while it is away for a while."""

    site: Site
    model_name: str
    clock: Callable[[], float]

    def look(self) -> dict[str, Any]:
        away_since: float | None = None
        while True:
            try:
                return _checked(rollout_state(self.site, self.model_name))
            except HostDown:
                if away_since is None:
                    away_since = self.clock()
                    say("the host is down; the canary gets nothing after 10 s; mansard up goes on with the rollout")
                if self.clock() - away_since > policy.HOST_AWAY_SECONDS:
                    raise
                time.sleep(policy.ROLLOUT_POLL_SECONDS)


def _checked(answer: dict[str, Any]) -> dict[str, Any]:
    """The host's answer; MansardError for one of another form, as of a host of another release."""
    numbers = dict.fromkeys(("step", "steps", "weight_percent"), int)
    kinds = {"state": str, **numbers, "reason": str, "version": int | None}
    wrong = [key for key, kind in kinds.items() if not isinstance(answer.get(key, ...), kind)]
    if wrong:
        what = f"{wrong[0]} {answer[wrong[0]]!r:.40}" if wrong[0] in answer else f"no {wrong[0]}"
        raise MansardError(
            f"the host's answer on its rollout: {what}; is it of another release? mansard down, mansard up; "
            "the rollout goes on meanwhile"
        )
    return answer


def _words(now: dict[str, Any]) -> str:
    if now["state"] == "starting":
        return "its engine starts and is checked before it gets any traffic"
    if now["state"] == "canary":
        return f"canary step {now['step']} of {now['steps']}, {now['weight_percent']} % of the traffic"
    return f"{now['state']}: {now['reason']}" if now["reason"] else str(now["state"])
