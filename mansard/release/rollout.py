"""The walk of a version from 0 % to all of the traffic, a pure state machine: (state, observation) -> state, actions.

Laws: promoted and aborted are final; weights only rise until the end; a step is passed only when its bake time, its
minimum sample and a passing look are there; a step that is not passed by its deadline is aborted, so low traffic never
promotes; a dead engine, a failed probe, a changed fingerprint or five consecutive failures abort at once, whatever the
sample; a canary is never judged against a dead stable: its users keep it, and the step is walked again once stable is
back. `resumed` gives the state again from the journal, after a crash at any point. Clocks, processes, journal and
traffic belong to the controller (serving/host/rollouts.py), which does the actions in their order.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from mansard.release.analysis import Finding, Limits, overall
from mansard.release.events import CANARY_STEP, ROLLOUT_STARTED, Entry
from mansard.release.looks import alpha_of_look, look_seconds

MAX_CONSECUTIVE_FAILURES = 5
PASS_LOOK_SECONDS = 2.0
"""Between looks that can only pass a step whose bake time is over; they spend no alpha."""
LATENCIES = {"first_token": "first_token_ms_p50", "per_token": "per_token_ms_p50", "request": "request_ms_p50"}
"""The analysis's latency metrics, and the figure of evaluation's cost stage that each is compared with."""

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
    limits: Limits

    @staticmethod
    def from_release(release: Mapping[str, Any], ratios: Mapping[str, float] | None) -> "Plan":
        """From the registration's release section and the candidate/stable ratios that evaluation measured.

        `ratios` is None for the first version of a model. KeyError, TypeError or ValueError for another form.
        """
        if ratios is None:
            return Plan((), Limits(0.0, {}, 1.0))
        steps = [
            Step(int(s["weight_percent"]), float(s["bake_seconds"]), int(s["min_requests"]), s["deadline_seconds"])
            for s in release["steps"]
        ]
        tolerance = float(release["latency_tolerance"])
        # Found faster, equal is still no harm; and what a few prompts measured on a starved machine may be noise.
        slower = {name: max(1.0, float(ratios[figure])) * tolerance for name, figure in LATENCIES.items()}
        limits = Limits(float(release["max_error_excess"]), slower, float(release["output_tolerance"]))
        return Plan(tuple(steps), limits)


@dataclass(frozen=True, slots=True)
class State:
    """`step` counts from 0, and while starting is the one to enter; `attempt` counts how often that step was begun.

    `looks` were taken in this step, `last_look_seconds` is when; `reason` says why the state is what it is. On hold,
    stable's engine is dead.
    """

    plan: Plan
    phase: Phase = "starting"
    step: int = 0
    attempt: int = 0
    looks: int = 0
    last_look_seconds: float = 0.0
    reason: str = "the engine is starting"
    is_on_hold: bool = False

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
    """What the controller sees now. `requests` reached the canary since the step began, and ended.

    `is_ready`: the engine serves, is warm, and its fingerprint is the recorded one. `is_heard`: every router worker
    that runs told its counts. `problem` names what aborts at once; empty when there is none. `findings` are those of
    the look that the last transition asked for, None where there was none. `engines` is what the engines measured
    themselves, in words: it is told with the findings and decides nothing. `is_stable_down`: its engine is dead.
    """

    seconds_in_step: float = 0.0
    requests: int = 0
    consecutive_failures: int = 0
    is_ready: bool = False
    is_heard: bool = True
    problem: str = ""
    findings: tuple[Finding, ...] | None = None
    engines: str = ""
    is_stable_down: bool = False


@dataclass(frozen=True, slots=True)
class Look:
    """Judge the sample of the step so far; `alpha` 0 for one that can only pass."""

    alpha: float


@dataclass(frozen=True, slots=True)
class SetWeight:
    """Journal the step, then the split; counting starts anew."""

    weight_percent: int
    reason: str


@dataclass(frozen=True, slots=True)
class Promote:
    """The canary becomes stable."""

    reason: str


@dataclass(frozen=True, slots=True)
class Abort:
    """The canary goes to 0 %; stable stays."""

    reason: str


def counted_run(failures: Iterable[int], num_tenants: int) -> int:
    """How long a run of consecutive failures counts; `failures` are each tenant's in it. Of five tenants or more that
    ask, five must be in it; of fewer, no one alone makes it long enough."""
    if num_tenants <= 1:
        return sum(failures)
    most = math.ceil(MAX_CONSECUTIVE_FAILURES / min(num_tenants, MAX_CONSECUTIVE_FAILURES))
    return sum(min(number, most) for number in failures)


Action = Look | SetWeight | Promote | Abort
Transition = tuple[State, tuple[Action, ...]]


def advance(state: State, seen: Observation) -> Transition:
    """The next state and what is to be done for it; the same state and nothing while there is nothing to decide."""
    if state.is_over:
        return state, ()
    if seen.problem:
        return _abort(state, seen.problem)
    if seen.consecutive_failures >= MAX_CONSECUTIVE_FAILURES:
        return _abort(state, f"{seen.consecutive_failures} consecutive requests to the canary failed")
    if seen.is_stable_down and state.weight_percent < 100:
        return _hold(state, seen)
    if state.phase == "starting":
        return _leave_start(state) if seen.is_ready and seen.is_heard else (state, ())
    if state.is_on_hold:
        return _enter(state, state.step, state.attempt + 1, "walked again: stable was down")
    return _bake(state, seen)


def aborted(state: State, reason: str) -> State:
    """Ended by a person, the host or the analysis; a rollout that is over stays as it ended."""
    return state if state.is_over else replace(state, phase="aborted", reason=reason)


def resumed(plan: Plan, entries: Iterable[Entry]) -> State:
    """The state of the open rollout whose entries these are (the newest ROLLOUT_STARTED and what follows).

    Always `starting`: the engine is checked again, and the step that was under way is walked again from its beginning.
    """
    state = State(plan)
    for entry in entries:
        if entry.kind == ROLLOUT_STARTED:
            state = State(plan)
        elif entry.kind == CANARY_STEP:
            step = [s.weight_percent for s in plan.steps].index(int(entry.body["weight_percent"]))
            attempt = state.attempt + 1 if step == state.step else 1
            state = replace(state, step=step, attempt=attempt, reason="the host was started again")
    return state


def _abort(state: State, reason: str) -> Transition:
    return aborted(state, reason), (Abort(reason),)


def _hold(state: State, seen: Observation) -> Transition:
    """Nothing is judged beside a dead stable; a deadline that passes meanwhile still ends the rollout."""
    if state.phase == "starting":
        return state, ()
    deadline = state.plan.steps[state.step].deadline_seconds
    if seen.seconds_in_step >= deadline:
        reason = f"step {state.step + 1}: stable was down at the deadline of {deadline:g} s: nothing to compare with"
        return _abort(state, reason)
    step = f"step {state.step + 1} of {len(state.plan.steps)}"
    return replace(state, is_on_hold=True, reason=f"{step} holds: stable is down; it is walked again after that"), ()


def _leave_start(state: State) -> Transition:
    if not state.plan.steps:
        reason = "the first version of this model: no stable to compare with"
        return replace(state, phase="promoted", reason=reason), (Promote(reason),)
    return _enter(state, state.step, state.attempt, "" if not state.attempt else "walked again after a restart")


def _enter(state: State, step: int, attempt: int, more: str) -> Transition:
    weight = state.plan.steps[step].weight_percent
    reason = f"step {step + 1} of {len(state.plan.steps)}: {weight} % of the traffic" + (f"; {more}" if more else "")
    return State(state.plan, "canary", step, attempt, reason=reason), (SetWeight(weight, reason),)


def _bake(state: State, seen: Observation) -> Transition:
    step = state.plan.steps[state.step]
    if seen.findings is not None:
        verdict = overall(seen.findings)
        text = "; ".join(told for told in (findings_text(seen.findings), seen.engines) if told)
        if verdict == "fail":
            return _abort(state, f"step {state.step + 1}: {text}")
        is_sampled = seen.requests >= step.min_requests and seen.seconds_in_step >= step.bake_seconds
        if verdict == "pass" and is_sampled:
            return _leave_step(state, text) if seen.is_heard else (state, ())
        if seen.seconds_in_step >= step.deadline_seconds:
            return _abort(state, _inconclusive(state, seen, text))
    return _look(state, seen)


def _look(state: State, seen: Observation) -> Transition:
    """Whether a look is due now: one that spends, or one that can only pass a baked step."""
    step, at = state.plan.steps[state.step], seen.seconds_in_step
    times = look_seconds(step.deadline_seconds)
    due = sum(time <= at for time in times)
    if due > state.looks:
        num_steps = len(state.plan.steps)
        alpha = alpha_of_look(state.step, num_steps, due - 1, step.deadline_seconds, state.attempt)
        return replace(state, looks=due, last_look_seconds=at), (Look(alpha),)
    is_baked = at >= step.bake_seconds and seen.requests >= step.min_requests
    is_over = at >= step.deadline_seconds and seen.findings is None
    if is_over or (is_baked and (at >= state.last_look_seconds + PASS_LOOK_SECONDS or not state.last_look_seconds)):
        return replace(state, last_look_seconds=at), (Look(0.0),)
    return state, ()


def _leave_step(state: State, found: str) -> Transition:
    following = state.step + 1
    if following < len(state.plan.steps):
        return _enter(state, following, 0, f"before: {found}")
    reason = f"all {following} steps passed; the last: {found}"
    return replace(state, phase="promoted", reason=reason), (Promote(reason),)


def _inconclusive(state: State, seen: Observation, text: str) -> str:
    step = state.plan.steps[state.step]
    return (
        f"step {state.step + 1}: inconclusive after {step.deadline_seconds:g} s: {seen.requests} of "
        f"{step.min_requests} requests reached the canary; {text or 'no user was compared'}; "
        "not knowing never promotes"
    )


def findings_text(findings: tuple[Finding, ...]) -> str:
    """Those that decide: the failed, else the inconclusive, else all of them."""
    for verdict in ("fail", "inconclusive"):
        chosen = [f.text() for f in findings if f.verdict == verdict]
        if chosen:
            return "; ".join(chosen)
    return "; ".join(f.text() for f in findings)
