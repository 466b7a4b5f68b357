"""The walk as a pure state machine, and the comparison that it asks: laws first, a few examples after."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from mansard.release.analysis import Counts, compare, difference_interval, wilson_interval
from mansard.release.rollout import MAX_CONSECUTIVE_FAILURES, Observation, Plan, State, Step, aborted, advance

ONE_STEP = Plan((Step(weight_percent=50, bake_seconds=10.0, min_requests=20, deadline_seconds=100.0),), 0.02)


@st.composite
def counts(draw: st.DrawFn, most: int = 200) -> Counts:
    requests = draw(st.integers(0, most))
    return Counts(requests, draw(st.integers(0, requests)))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    weights = sorted(draw(st.sets(st.integers(1, 100), max_size=4)))
    steps = [
        Step(
            weight,
            bake_seconds=draw(st.floats(0, 50)),
            min_requests=draw(st.integers(1, 100)),
            deadline_seconds=draw(st.floats(1, 100)),
        )
        for weight in weights
    ]
    return Plan(tuple(steps), draw(st.floats(0, 1)))


observations = st.builds(
    Observation,
    seconds_in_step=st.floats(0, 120),
    canary=counts(),
    stable=counts(),
    consecutive_failures=st.integers(0, 7),
    is_ready=st.booleans(),
    problem=st.sampled_from(["", "", "", "its engine died"]),
)
healthy = st.builds(
    Observation,
    seconds_in_step=st.floats(0, 120),
    canary=counts().map(lambda c: Counts(c.requests, 0)),
    stable=counts(),
    is_ready=st.just(True),
)


def walk(plan: Plan, seen: list[Observation]) -> list[State]:
    states = [State(plan)]
    for observation in seen:
        states.append(advance(states[-1], observation))
    return states


@given(plans(), st.lists(observations, max_size=40))
def test_weights_only_rise_until_the_end_and_an_end_is_final(plan: Plan, seen: list[Observation]) -> None:
    states = walk(plan, seen)
    for before, after in itertools.pairwise(states):
        if before.is_over:
            assert after == before
        elif after.phase == "aborted":
            assert after.weight_percent == 0
        else:
            assert after.weight_percent >= before.weight_percent
            assert after.phase == "promoted" or after.step - before.step in (0, 1)


@given(plans(), st.lists(st.one_of(observations, healthy), max_size=40))
def test_a_step_is_left_upward_only_with_its_bake_time_its_sample_and_a_pass(
    plan: Plan, seen: list[Observation]
) -> None:
    states = walk(plan, seen)
    for before, after, observation in zip(states, states[1:], seen, strict=False):
        went_up = before.phase == "canary" and (after.phase == "promoted" or after.step > before.step)
        if went_up:
            step = plan.steps[before.step]
            assert observation.canary.requests >= step.min_requests
            assert observation.seconds_in_step >= step.bake_seconds
            assert observation.canary.error_rate - observation.stable.error_rate <= plan.max_error_excess
            assert not observation.problem
            assert observation.consecutive_failures < MAX_CONSECUTIVE_FAILURES


@given(plans(), st.lists(observations, max_size=40))
def test_no_promotion_skips_a_step(plan: Plan, seen: list[Observation]) -> None:
    states = walk(plan, seen)
    if states[-1].phase == "promoted":
        passed = [s.step for s in states if s.phase == "canary"]
        assert sorted(set(passed)) == list(range(len(plan.steps)))


@given(plans(), st.lists(observations, max_size=10), observations)
def test_a_hard_problem_aborts_whatever_the_sample(plan: Plan, seen: list[Observation], last: Observation) -> None:
    state = walk(plan, seen)[-1]
    after = advance(state, last)
    hopeless = last.problem or last.consecutive_failures >= MAX_CONSECUTIVE_FAILURES
    if hopeless and not state.is_over:
        assert after.phase == "aborted"
        assert after.reason


@given(plans().filter(lambda p: p.steps), st.lists(healthy, max_size=20))
def test_low_traffic_never_promotes(plan: Plan, seen: list[Observation]) -> None:
    least = min(step.min_requests for step in plan.steps)
    quiet = [
        Observation(o.seconds_in_step, Counts(min(o.canary.requests, least - 1), 0), o.stable, is_ready=True)
        for o in seen
    ]
    states = walk(plan, quiet)
    assert all(s.phase in ("starting", "canary", "aborted") and s.step == 0 for s in states)


def test_nothing_happens_before_the_engine_is_ready() -> None:
    assert advance(State(ONE_STEP), Observation(seconds_in_step=1e6)) == State(ONE_STEP)


def test_the_first_version_of_a_model_is_promoted_once_it_is_ready() -> None:
    release = {"steps": [{"weight_percent": 5, "bake_seconds": 1, "min_requests": 1, "deadline_seconds": 9}]}
    plan = Plan.from_release({**release, "max_error_excess": 0.02}, has_stable=False)
    assert advance(State(plan), Observation(is_ready=True)).phase == "promoted"


def test_an_inconclusive_step_is_aborted_at_its_deadline_and_says_so() -> None:
    canary = advance(State(ONE_STEP), Observation(is_ready=True))
    waiting = advance(canary, Observation(seconds_in_step=99.0, canary=Counts(19, 0), is_ready=True))
    assert waiting == canary
    ended = advance(waiting, Observation(seconds_in_step=100.0, canary=Counts(19, 0), is_ready=True))
    assert ended.phase == "aborted"
    assert "19 of 20 requests" in ended.reason


def test_too_many_errors_abort_before_the_bake_time_is_over() -> None:
    canary = advance(State(ONE_STEP), Observation(is_ready=True))
    ended = advance(canary, Observation(1.0, Counts(20, 2), Counts(100, 1), is_ready=True))
    assert ended.phase == "aborted"
    assert "2 of 20 failed" in ended.reason


def test_an_abort_by_a_person_does_not_undo_a_promotion() -> None:
    promoted = State(ONE_STEP, phase="promoted")
    assert aborted(promoted, "too late") == promoted


@given(counts(), counts(), st.integers(1, 100), st.floats(0, 1))
def test_a_verdict_needs_its_sample_and_follows_the_excess(
    canary: Counts, stable: Counts, min_requests: int, limit: float
) -> None:
    found = compare(canary, stable, min_requests, limit)
    assert (found.verdict == "inconclusive") == (canary.requests < min_requests)
    if found.verdict != "inconclusive":
        assert (found.verdict == "pass") == (canary.error_rate - stable.error_rate <= limit)


@given(counts(), counts())
def test_the_interval_holds_the_measured_excess(canary: Counts, stable: Counts) -> None:
    low, high = difference_interval(canary, stable)
    excess = canary.error_rate - stable.error_rate
    assert -1.0 <= low <= excess + 1e-12
    assert excess - 1e-12 <= high <= 1.0


def test_intervals_are_those_of_the_papers_formula() -> None:
    # Newcombe (1998), table II, case (a): 56/70 against 48/80, there at 95 %: 0.0524 to 0.3339; at 90 % inside it.
    low, high = difference_interval(Counts(70, 56), Counts(80, 48))
    assert 0.0524 < low < 0.2 < high < 0.3339
    assert wilson_interval(Counts()) == (0.0, 1.0)


def test_a_stable_without_traffic_counts_as_faultless() -> None:
    assert compare(Counts(100, 3), Counts(), 10, 0.02).verdict == "fail"
    assert compare(Counts(100, 2), Counts(), 10, 0.02).verdict == "pass"
