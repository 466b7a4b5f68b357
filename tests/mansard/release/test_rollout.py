"""The walk as a pure state machine: laws first, a few examples after."""

import itertools
import math
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mansard.release.analysis import Finding, Limits
from mansard.release.events import CANARY_STEP, ROLLOUT_STARTED, Entry, as_text
from mansard.release.looks import ALPHA, alpha_of_look, look_seconds
from mansard.release.rollout import (
    MAX_CONSECUTIVE_FAILURES,
    Abort,
    Action,
    Look,
    Observation,
    Plan,
    Promote,
    SetWeight,
    State,
    Step,
    aborted,
    advance,
    resumed,
)

LIMITS = Limits(0.01, {"first_token": 1.2, "per_token": 1.2, "request": 1.2}, 2.0)
ONE_STEP = Plan((Step(weight_percent=50, bake_seconds=10.0, min_requests=20, deadline_seconds=100.0),), LIMITS)


def finding(verdict: str, metric: str = "errors") -> Finding:
    return Finding(metric, verdict, 40, 40, 0.0, (-0.1, 0.1), 0.01, 0.02)  # type: ignore[arg-type]


PASS, FAIL, UNKNOWN = (finding("pass"), finding("pass", "request")), (finding("fail"),), (finding("inconclusive"),)


@st.composite
def plans(draw: st.DrawFn, least: int = 0) -> Plan:
    weights = sorted(draw(st.sets(st.integers(1, 100), min_size=least, max_size=4)))
    steps = [
        Step(
            weight,
            bake_seconds=draw(st.floats(0, 50)),
            min_requests=draw(st.integers(1, 100)),
            deadline_seconds=draw(st.floats(1, 100)),
        )
        for weight in weights
    ]
    return Plan(tuple(steps), LIMITS)


observations = st.builds(
    Observation,
    seconds_in_step=st.floats(0, 120),
    requests=st.integers(0, 200),
    consecutive_failures=st.integers(0, 7),
    is_ready=st.booleans(),
    is_heard=st.booleans(),
    problem=st.sampled_from(["", "", "", "its engine died"]),
    findings=st.sampled_from([None, None, PASS, PASS, FAIL, UNKNOWN, ()]),
)
healthy = st.builds(
    Observation,
    seconds_in_step=st.floats(0, 120),
    requests=st.integers(0, 200),
    is_ready=st.just(True),
    findings=st.sampled_from([None, PASS]),
)


def walk(plan: Plan, seen: list[Observation]) -> tuple[list[State], list[tuple[Action, ...]]]:
    states, actions = [State(plan)], []
    for observation in seen:
        following, todo = advance(states[-1], observation)
        states.append(following)
        actions.append(todo)
    return states, actions


@given(plans(), st.lists(observations, max_size=40))
def test_weights_only_rise_until_the_end_and_an_end_is_final(plan: Plan, seen: list[Observation]) -> None:
    states, actions = walk(plan, seen)
    for before, after, todo in zip(states, states[1:], actions, strict=False):
        if before.is_over:
            assert (after, todo) == (before, ())
        elif after.phase == "aborted":
            assert after.weight_percent == 0
        else:
            assert after.weight_percent >= before.weight_percent
            assert after.phase == "promoted" or after.step - before.step in (0, 1)


@given(plans(), st.lists(st.one_of(observations, healthy), max_size=40))
def test_every_change_of_traffic_is_an_action_and_every_action_a_change(plan: Plan, seen: list[Observation]) -> None:
    states, actions = walk(plan, seen)
    for before, after, todo in zip(states, states[1:], actions, strict=False):
        assert len(todo) <= 1
        moved = (before.phase, before.weight_percent) != (after.phase, after.weight_percent)
        assert moved == any(isinstance(action, SetWeight | Promote | Abort) for action in todo)
        if todo and isinstance(todo[0], SetWeight):
            assert todo[0].weight_percent == after.weight_percent


@given(plans(), st.lists(st.one_of(observations, healthy), max_size=40))
def test_a_step_is_left_upward_only_with_its_bake_time_its_sample_and_a_pass(
    plan: Plan, seen: list[Observation]
) -> None:
    states, _ = walk(plan, seen)
    for before, after, observation in zip(states, states[1:], seen, strict=False):
        if before.phase == "canary" and (after.phase == "promoted" or after.step > before.step):
            step = plan.steps[before.step]
            assert observation.findings == PASS
            assert observation.requests >= step.min_requests
            assert observation.seconds_in_step >= step.bake_seconds
            assert observation.is_heard
            assert not observation.problem
            assert observation.consecutive_failures < MAX_CONSECUTIVE_FAILURES


@given(plans(), st.lists(st.one_of(observations, healthy), max_size=40))
def test_no_promotion_skips_a_step(plan: Plan, seen: list[Observation]) -> None:
    states, _ = walk(plan, seen)
    if states[-1].phase == "promoted":
        passed = [s.step for s in states if s.phase == "canary"]
        assert sorted(set(passed)) == list(range(len(plan.steps)))


@given(plans(), st.lists(observations, max_size=10), observations)
def test_a_hard_problem_or_a_failing_look_aborts_at_once(
    plan: Plan, seen: list[Observation], last: Observation
) -> None:
    state = walk(plan, seen)[0][-1]
    after, actions = advance(state, last)
    is_hopeless = last.problem or last.consecutive_failures >= MAX_CONSECUTIVE_FAILURES
    is_failed = state.phase == "canary" and last.findings == FAIL
    if (is_hopeless or is_failed) and not state.is_over:
        assert after.phase == "aborted"
        assert actions == (Abort(after.reason),)


@given(plans(least=1), st.lists(healthy, max_size=20))
def test_low_traffic_never_promotes(plan: Plan, seen: list[Observation]) -> None:
    least = min(step.min_requests for step in plan.steps)
    quiet = [
        Observation(o.seconds_in_step, min(o.requests, least - 1), is_ready=True, findings=o.findings) for o in seen
    ]
    assert all(s.phase in ("starting", "canary", "aborted") and s.step == 0 for s in walk(plan, quiet)[0])


@given(plans(least=1), st.lists(st.one_of(observations, healthy), max_size=60))
def test_looks_of_a_rollout_spend_no_more_than_alpha(plan: Plan, seen: list[Observation]) -> None:
    clock = itertools.accumulate(abs(o.seconds_in_step) % 7 for o in seen)  # time in a step only grows
    spent = 0.0
    state = State(plan)
    for observation, at in zip(seen, clock, strict=True):
        ahead = Observation(at, observation.requests, is_ready=True, findings=observation.findings)
        state, actions = advance(state, ahead)
        spent += sum(action.alpha for action in actions if isinstance(action, Look))
    assert spent <= ALPHA * (1 + 1e-9)


@given(st.integers(1, 5), st.floats(1, 1e5))
def test_all_looks_of_all_steps_however_often_begun_spend_at_most_alpha(num_steps: int, deadline: float) -> None:
    looks = range(len(look_seconds(deadline)))
    total = sum(
        alpha_of_look(step, num_steps, look, deadline, attempt)
        for step in range(num_steps)
        for look in looks
        for attempt in range(60)
    )
    assert 0.9 * ALPHA < total <= ALPHA * (1 + 1e-9)


def entry(sequence: int, kind: str, weight: int | None = None) -> Entry:
    body = {"version": 2} if weight is None else {"version": 2, "weight_percent": weight}
    at = as_text(datetime(2026, 1, 1, tzinfo=UTC))
    return Entry(sequence, "demo", kind, at, "host", "", body, "", "")


@given(plans(least=1), st.data())
def test_a_walk_is_taken_up_at_the_step_that_the_journal_names(plan: Plan, data: st.DataObject) -> None:
    last = data.draw(st.integers(0, len(plan.steps) - 1))
    again = data.draw(st.integers(0, 3))
    weights = [s.weight_percent for s in plan.steps[: last + 1]] + [plan.steps[last].weight_percent] * again
    entries = [entry(1, ROLLOUT_STARTED), *(entry(n, CANARY_STEP, w) for n, w in enumerate(weights, 2))]
    state = resumed(plan, entries)
    assert (state.phase, state.step, state.attempt) == ("starting", last, 1 + again)
    following, actions = advance(state, Observation(is_ready=True))
    assert [type(action) for action in actions] == [SetWeight]
    assert following.weight_percent == plan.steps[last].weight_percent
    assert following.attempt == 1 + again


def test_a_walk_that_had_no_traffic_yet_begins_with_its_first_step() -> None:
    assert resumed(ONE_STEP, [entry(1, ROLLOUT_STARTED)]) == State(ONE_STEP)


def test_a_step_that_the_plan_does_not_have_any_more_is_refused() -> None:
    with pytest.raises(ValueError, match="7"):
        resumed(ONE_STEP, [entry(1, ROLLOUT_STARTED), entry(2, CANARY_STEP, 7)])


def test_nothing_happens_before_the_engine_is_ready() -> None:
    assert advance(State(ONE_STEP), Observation(seconds_in_step=1e6)) == (State(ONE_STEP), ())


def test_the_first_version_of_a_model_is_promoted_once_it_is_ready() -> None:
    plan = Plan.from_release({}, None)
    assert advance(State(plan), Observation(is_ready=True))[0].phase == "promoted"


def test_latency_is_held_against_what_evaluation_measured_and_never_against_1() -> None:
    step = {"weight_percent": 5, "bake_seconds": 1, "min_requests": 1, "deadline_seconds": 9}
    release = {"steps": [step], "max_error_excess": 0.01, "latency_tolerance": 1.25, "output_tolerance": 2.0}
    ratios = {"first_token_ms_p50": 1.6, "per_token_ms_p50": 1.2, "request_ms_p50": 1.4}
    slower = Plan.from_release(release, ratios).limits.slower
    assert {k: round(v, 9) for k, v in slower.items()} == {"first_token": 2.0, "per_token": 1.5, "request": 1.75}


def test_a_candidate_that_evaluation_found_faster_may_be_as_slow_as_stable() -> None:
    """Tokens of a starved engine arrive in one burst: a step was aborted for not being 500 times as fast as stable."""
    release = {"steps": [], "max_error_excess": 0.01, "latency_tolerance": 1.5, "output_tolerance": 2.0}
    ratios = {"first_token_ms_p50": 5.06, "per_token_ms_p50": 0.002, "request_ms_p50": 0.9}
    slower = Plan.from_release(release, ratios).limits.slower
    assert slower == {"first_token": 5.06 * 1.5, "per_token": 1.5, "request": 1.5}


def test_an_inconclusive_step_is_looked_at_at_its_deadline_and_then_aborted() -> None:
    canary, _ = advance(State(ONE_STEP), Observation(is_ready=True))
    for at in look_seconds(100.0):
        canary, actions = advance(canary, Observation(at, 19, is_ready=True))
        assert [type(action) for action in actions] == [Look]
        assert canary.phase == "canary"
    ended, actions = advance(canary, Observation(100.5, 19, is_ready=True, findings=UNKNOWN))
    assert actions == (Abort(ended.reason),)
    assert "19 of 20 requests" in ended.reason
    assert "not knowing never promotes" in ended.reason


def test_a_failing_look_aborts_before_the_bake_time_is_over() -> None:
    canary, _ = advance(State(ONE_STEP), Observation(is_ready=True))
    ended, _ = advance(canary, Observation(1.0, 20, is_ready=True, findings=FAIL))
    assert ended.phase == "aborted"
    assert ended.reason.startswith("step 1: errors:")


def test_a_baked_step_is_looked_at_again_and_again_without_spending() -> None:
    state, _ = advance(State(ONE_STEP), Observation(is_ready=True))
    spent = []
    for tick in range(1, 60):
        state, actions = advance(state, Observation(10.0 + tick * 0.5, 20, is_ready=True))
        spent += [(round(a.alpha, 6) > 0) for a in actions if isinstance(a, Look)]
    assert sum(spent) == 2  # at 14.5 and 29 s
    assert spent.count(False) >= 8


@given(plans(least=1), st.lists(st.tuples(st.one_of(observations, healthy), st.booleans()), max_size=40))
def test_no_step_beside_a_dead_stable_is_passed_and_its_looks_decide_nothing(
    plan: Plan, seen: list[tuple[Observation, bool]]
) -> None:
    state = State(plan)
    for observation, is_down in seen:
        before = state
        state, actions = advance(before, replace(observation, is_stable_down=is_down))
        if is_down and before.weight_percent < 100 and not before.is_over:
            assert state.step == before.step and state.phase in (before.phase, "aborted")
            assert not any(isinstance(action, SetWeight | Promote | Look) for action in actions)
        if before.is_on_hold and not is_down and state.phase == "canary":
            assert state == replace(State(plan, "canary", before.step, before.attempt + 1), reason=state.reason)
            assert actions == (SetWeight(before.weight_percent, state.reason),)


def test_a_canary_beside_a_dead_stable_still_ends_by_its_own_faults_and_by_its_deadline() -> None:
    state, _ = advance(State(ONE_STEP), Observation(is_ready=True))
    state, actions = advance(state, Observation(20.0, 40, findings=FAIL, is_stable_down=True))
    assert (state.phase, state.is_on_hold, actions) == ("canary", True, ())
    for fault in (Observation(problem="its engine died", is_stable_down=True), Observation(100.5, is_stable_down=True)):
        ended, actions = advance(state, fault)
        assert actions == (Abort(ended.reason),)
    assert ended.reason == "step 1: stable was down at the deadline of 100 s: nothing to compare with"


def test_a_canary_with_all_of_the_traffic_is_judged_by_its_own_past_whatever_stable_does() -> None:
    all_of_it = State(replace(ONE_STEP, steps=(replace(ONE_STEP.steps[0], weight_percent=100),)), "canary")
    seen = Observation(20.0, 40, findings=PASS, is_stable_down=True)
    assert advance(all_of_it, seen)[0].phase == "promoted"


def test_an_abort_by_a_person_does_not_undo_a_promotion() -> None:
    promoted = State(ONE_STEP, phase="promoted")
    assert aborted(promoted, "too late") == promoted


def test_findings_without_data_read_as_sentences() -> None:
    text = Finding("errors", "inconclusive", 3, 40, math.nan, (-math.inf, math.inf), 0.01, math.nan).text()
    expected = "errors: inconclusive, 3 and 40 users of one tenant, whose users nobody else confirms; 30 on each side"
    assert text == f"{expected} are needed"
