"""The walk of a version from 0 % to all of the traffic, as a pure state machine: (state, observation) -> state.

Laws: promoted and aborted are final; weights only rise until the end; a step is passed only when its bake time and its
minimum sample are there and the analysis says pass; a step that is not passed by its deadline is aborted, so low
traffic never promotes; a dead engine, a failed probe, a changed fingerprint or five consecutive failures abort at once,
whatever the sample. Clocks, processes, journal and traffic belong to the controller (serving/host_rollouts.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from mansard.release.analysis import Counts, compare

MAX_CONSECUTIVE_FAILURES = 5
NO_REQUESTS = Counts()

Phase = Literal["starting", "canary", "promoted", "aborted"]


@dataclass(frozen=True, slots=True)
class Step:
    """One stop of the walk."""

    weight_percent: int
    bake_seconds: float
    min_requests: int
    deadline_seconds: float


@dataclass(frozen=True, slots=True)
class Plan:
    """The stops in order, weights rising. No stops: the first version of a model, with nothing to compare to."""

    steps: tuple[Step, ...]
    max_error_excess: float

    @staticmethod
    def from_release(release: Mapping[str, Any], has_stable: bool) -> "Plan":
        """The spec's release section as the registration holds it, word for word."""
        steps = [
            Step(int(s["weight_percent"]), float(s["bake_seconds"]), int(s["min_requests"]), s["deadline_seconds"])
            for s in release["steps"]
        ]
        return Plan(tuple(steps) if has_stable else (), float(release["max_error_excess"]))


@dataclass(frozen=True, slots=True)
class State:
    """`step` counts from 0; `reason` says why the state is what it is."""

    plan: Plan
    phase: Phase = "starting"
    step: int = 0
    reason: str = "the engine is starting"

    @property
    def weight_percent(self) -> int:
        """The canary's share: 0 before the first step and after an abort, 100 once promoted."""
        if self.phase == "canary":
            return self.plan.steps[self.step].weight_percent
        return 100 if self.phase == "promoted" else 0

    @property
    def is_over(self) -> bool:
        return self.phase in ("promoted", "aborted")


@dataclass(frozen=True, slots=True)
class Observation:
    """What the controller sees now. Counts are since the step began, of requests that began in it or before.

    `is_ready`: the engine serves, is warm, and its fingerprint is the recorded one. `problem` names what aborts at
    once; empty when there is none.
    """

    seconds_in_step: float = 0.0
    canary: Counts = NO_REQUESTS
    stable: Counts = NO_REQUESTS
    consecutive_failures: int = 0
    is_ready: bool = False
    problem: str = ""


def advance(state: State, observation: Observation) -> State:
    """The next state; the same one while there is nothing to decide."""
    if state.is_over:
        return state
    if observation.problem:
        return aborted(state, observation.problem)
    if observation.consecutive_failures >= MAX_CONSECUTIVE_FAILURES:
        return aborted(state, f"{observation.consecutive_failures} consecutive requests to the canary failed")
    if state.phase == "starting":
        return _leave_start(state) if observation.is_ready else state
    return _bake(state, observation)


def aborted(state: State, reason: str) -> State:
    """Ended by a person, the host or the analysis; a rollout that is over stays as it ended."""
    return state if state.is_over else replace(state, phase="aborted", reason=reason)


def _leave_start(state: State) -> State:
    if not state.plan.steps:
        return replace(state, phase="promoted", reason="the first version of this model: no stable to compare with")
    return replace(state, phase="canary", step=0, reason=_stop_text(state.plan, 0))


def _bake(state: State, observation: Observation) -> State:
    step = state.plan.steps[state.step]
    found = compare(observation.canary, observation.stable, step.min_requests, state.plan.max_error_excess)
    if found.verdict == "fail":
        return aborted(state, f"step {state.step + 1}: too many errors: {found.text()}")
    if found.verdict == "pass" and observation.seconds_in_step >= step.bake_seconds:
        return _leave_step(state, found.text())
    if observation.seconds_in_step >= step.deadline_seconds:
        return aborted(
            state,
            f"step {state.step + 1}: inconclusive after {step.deadline_seconds:g} s: {observation.canary.requests} of "
            f"{step.min_requests} requests reached the canary; not knowing never promotes",
        )
    return state


def _leave_step(state: State, found: str) -> State:
    following = state.step + 1
    if following == len(state.plan.steps):
        return replace(state, phase="promoted", reason=f"all {following} steps passed; the last: {found}")
    return replace(state, step=following, reason=f"{_stop_text(state.plan, following)}; before: {found}")


def _stop_text(plan: Plan, index: int) -> str:
    step = plan.steps[index]
    return f"step {index + 1} of {len(plan.steps)}: {step.weight_percent} % of the traffic"
