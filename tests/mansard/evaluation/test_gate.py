"""The gate's truth table, and the laws that hold whatever the numbers."""

from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mansard.evaluation.comparison import Comparison, Estimate
from mansard.evaluation.gate import Evidence, Role, Verdict, best_of, decide, holm_levels, rule

ORDER: list[Verdict] = ["fail", "inconclusive", "pass"]


def comparison(low: float | None, high: float | None, before: float = 2.0) -> Comparison:
    middle = 0.0 if low is None or high is None else (low + high) / 2
    point = Estimate(before, before, before)
    return Comparison(300, 100, point, point, Estimate(middle, low, high), 0.01)


def evidence(
    role: Role,
    interval: tuple[float | None, float | None],
    margin: float = 0.0,
    measure: str = "bits_per_byte",
    anchor: tuple[float | None, float | None] | None = None,
    before: float = 2.0,
) -> Evidence:
    against = comparison(*interval, before=before)
    return Evidence("s", measure, role, margin, 0.25, against, comparison(*(anchor or interval), before=before), 0.05)


@pytest.mark.parametrize(
    ("role", "interval", "margin", "wanted"),
    [
        ("target", (-0.3, -0.1), 0.0, "pass"),
        ("target", (-0.3, 0.1), 0.0, "inconclusive"),
        ("target", (0.1, 0.3), 0.0, "fail"),
        ("target", (0.0, 0.0), 0.0, "fail"),
        ("target", (-0.3, 0.0), 0.0, "inconclusive"),
        ("target", (-0.3, -0.1), 0.05, "pass"),
        ("target", (-0.3, -0.1), 0.2, "inconclusive"),
        ("target", (-0.3, -0.1), 0.4, "fail"),
        ("guard", (-0.01, 0.01), 0.02, "pass"),
        ("guard", (0.01, 0.015), 0.02, "pass"),
        ("guard", (0.01, 0.03), 0.02, "inconclusive"),
        ("guard", (0.03, 0.05), 0.02, "fail"),
        ("guard", (-0.3, -0.1), 0.02, "pass"),
        ("guard", (0.0, 0.0), 0.0, "pass"),
        ("guard", (None, None), 0.02, "inconclusive"),
        ("target", (None, None), 0.0, "inconclusive"),
    ],
)
def test_truth_table_of_bits_per_byte(role: Role, interval: tuple[float, float], margin: float, wanted: str) -> None:
    assert rule(evidence(role, interval, margin)).verdict == wanted


@pytest.mark.parametrize(
    ("role", "interval", "margin", "wanted"),
    [
        ("target", (0.01, 0.03), 0.0, "pass"),
        ("target", (-0.03, -0.01), 0.0, "fail"),
        ("guard", (-0.01, 0.03), 0.02, "pass"),
        ("guard", (-0.03, 0.01), 0.02, "inconclusive"),
        ("guard", (-0.05, -0.03), 0.02, "fail"),
    ],
)
def test_more_right_answers_are_better(role: Role, interval: tuple[float, float], margin: float, wanted: str) -> None:
    assert rule(evidence(role, interval, margin, "accuracy", before=0.6)).verdict == wanted


def test_guard_must_hold_against_the_anchor_too() -> None:
    assert rule(evidence("guard", (0.0, 0.01), 0.02, anchor=(0.03, 0.05))).verdict == "fail"
    assert rule(evidence("guard", (0.0, 0.01), 0.02, anchor=(0.01, 0.05))).verdict == "inconclusive"


def test_guard_without_anchor_records_is_inconclusive() -> None:
    known = evidence("guard", (0.0, 0.01), 0.02)
    unknown = Evidence("s", known.measure, "guard", 0.02, 0.25, known.baseline, None, 0.05)
    assert rule(unknown).verdict == "inconclusive"


def test_suite_without_baseline_records_is_inconclusive() -> None:
    ruling = rule(Evidence("s", "bits_per_byte", "guard", 0.02, 0.25, None, None, 0.05))
    assert ruling.gates and ruling.verdict == "inconclusive"


@pytest.mark.parametrize(("before", "gates"), [(0.26, False), (0.3999, False), (0.4, True), (0.7, True)])
def test_questions_gate_only_fifteen_points_above_chance(before: float, gates: bool) -> None:
    ruling = rule(evidence("guard", (-0.5, -0.4), 0.02, "accuracy", before=before))
    assert ruling.gates is gates
    assert gates or "above chance" in ruling.reason


def test_reported_suite_never_decides() -> None:
    bad, good = evidence("report", (0.5, 0.6)), evidence("target", (-0.3, -0.1))
    assert decide([rule(bad), rule(good)], [bad, good])[0] == "pass"


def test_no_data_is_never_a_pass() -> None:
    reported = evidence("report", (-0.5, -0.4))
    assert decide([], [])[0] == "inconclusive"
    assert decide([rule(reported)], [reported])[0] == "inconclusive"


def test_targets_that_cannot_gate_leave_the_verdict_open() -> None:
    target = evidence("target", (0.1, 0.2), 0.0, "accuracy", before=0.26)
    guard = evidence("guard", (-0.01, 0.01), 0.02)
    assert decide([rule(target), rule(guard)], [target, guard]) == (
        "inconclusive",
        "the spec has targets, but none of them can gate",
    )


def named(name: str, one: Evidence) -> Evidence:
    return replace(one, suite=name)


def decided(rows: list[Evidence], targets: Literal["all", "any"]) -> str:
    return decide([rule(e) for e in rows], rows, targets)[0]


def test_all_targets_or_any_as_the_spec_says() -> None:
    good, bad = named("good", evidence("target", (-0.3, -0.1))), named("bad", evidence("target", (0.1, 0.3)))
    open_ = named("open", evidence("target", (-0.1, 0.1)))
    guard = named("guard", evidence("guard", (-0.01, 0.01), 0.02))
    assert [decided([good, bad, guard], t) for t in ("all", "any")] == ["fail", "pass"]
    assert [decided([good, open_, guard], t) for t in ("all", "any")] == ["inconclusive", "pass"]
    assert [decided([bad, open_, guard], t) for t in ("all", "any")] == ["fail", "inconclusive"]
    assert [decided([bad, guard], t) for t in ("all", "any")] == ["fail", "fail"]


def test_a_good_target_never_excuses_a_guard() -> None:
    good, guard = named("good", evidence("target", (-0.3, -0.1))), named("guard", evidence("guard", (0.03, 0.05), 0.02))
    assert [decided([good, guard], t) for t in ("all", "any")] == ["fail", "fail"]


def test_all_targets_means_also_those_that_cannot_gate() -> None:
    near_chance = named("near", evidence("target", (0.1, 0.2), 0.0, "accuracy", before=0.26))
    good = named("good", evidence("target", (-0.3, -0.1)))
    guard = named("guard", evidence("guard", (-0.01, 0.01), 0.02))
    assert [decided([good, near_chance, guard], t) for t in ("all", "any")] == ["inconclusive", "pass"]


@given(st.lists(st.floats(0.0001, 1), min_size=1, max_size=6), st.floats(0.001, 0.2))
def test_holm_passes_the_targets_that_the_step_down_over_p_values_passes(values: list[float], alpha: float) -> None:
    levels = holm_levels([lambda level, p=p: p <= level for p in values], alpha)  # type: ignore[misc]
    passed = {i for i, p in enumerate(values) if p <= levels[i]}
    wanted: set[int] = set()
    for step, i in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        if values[i] > alpha / (len(values) - step):
            break
        wanted.add(i)
    assert passed == wanted


effects = st.floats(-1, 1)
margins = st.floats(0, 0.5)
measures = st.sampled_from(["bits_per_byte", "accuracy"])
roles: st.SearchStrategy[Role] = st.sampled_from(["target", "guard"])


@given(roles, measures, effects, effects, margins, st.floats(0, 1))
def test_a_better_effect_never_makes_a_worse_ruling(
    role: Role, measure: str, one: float, other: float, margin: float, better_by: float
) -> None:
    low, high = sorted((one, other))
    step = better_by if measure == "accuracy" else -better_by
    now = rule(evidence(role, (low, high), margin, measure, before=0.9)).verdict
    then = rule(evidence(role, (low + step, high + step), margin, measure, before=0.9)).verdict
    assert ORDER.index(then) >= ORDER.index(now)


@given(roles, measures, effects, effects, margins, st.floats(0, 0.5))
def test_a_wider_interval_never_settles_what_a_narrow_one_left_open(
    role: Role, measure: str, one: float, other: float, margin: float, wider: float
) -> None:
    low, high = sorted((one, other))
    assume(rule(evidence(role, (low, high), margin, measure, before=0.9)).verdict == "inconclusive")
    assert rule(evidence(role, (low - wider, high + wider), margin, measure, before=0.9)).verdict == "inconclusive"


@given(measures, effects, effects, margins, margins)
def test_a_larger_margin_helps_guards_and_hinders_targets(
    measure: str, one: float, other: float, small: float, more: float
) -> None:
    interval = (min(one, other), max(one, other))
    for role, sign in (("guard", 1), ("target", -1)):
        tight = rule(evidence(role, interval, small, measure, before=0.9)).verdict  # type: ignore[arg-type]
        wide = rule(evidence(role, interval, small + more, measure, before=0.9)).verdict  # type: ignore[arg-type]
        assert sign * (ORDER.index(wide) - ORDER.index(tight)) >= 0


@given(st.lists(st.tuples(roles, effects, effects, margins), min_size=1, max_size=6), st.randoms())
def test_overall_verdict_is_the_worst_and_order_does_not_matter(
    rows: list[tuple[Role, float, float, float]], random: object
) -> None:
    found = [
        named(str(i), evidence(role, (min(a, b), max(a, b)), margin)) for i, (role, a, b, margin) in enumerate(rows)
    ]
    rulings = [rule(e) for e in found]
    verdict = decide(rulings, found)[0]
    assert ORDER.index(verdict) == min(ORDER.index(r.verdict) for r in rulings)
    shuffled = list(found)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert decide([rule(e) for e in shuffled], shuffled)[0] == verdict
    for_any = decide(rulings, found, "any")[0]
    parts = {r: [x.verdict for x, e in zip(rulings, found, strict=True) if e.role == r] for r in ("guard", "target")}
    best = [best_of(parts["target"])] if parts["target"] else []
    assert ORDER.index(for_any) == min(ORDER.index(v) for v in [*parts["guard"], *best])
