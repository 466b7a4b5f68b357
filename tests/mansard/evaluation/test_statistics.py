"""Paired comparisons against brute force, known values and the laws that hold whatever the numbers."""

import itertools
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mansard.evaluation.bootstrap import resample, widening
from mansard.evaluation.statistics import (
    MIN_CLUSTERS,
    cluster_sums,
    compare_answers,
    compare_means,
    describe_answers,
    describe_means,
    detectable_effect,
)

FILES = [f"file{i:02d}" for i in range(12)]


def test_deviations_are_those_of_all_resamples() -> None:
    amounts, sizes = np.array([3.0, 1.0, 4.0, 1.5]), np.array([1.0, 2.0, 1.0, 1.5])
    value, exact = amounts.sum() / sizes.sum(), []
    for drawn in itertools.product(range(4), repeat=4):
        a, s = amounts[list(drawn)], sizes[list(drawn)]
        again = a.sum() / s.sum()
        error = np.sqrt(4 / 3 * ((a - again * s) ** 2).sum()) / s.sum()
        exact.append((again - value) / error if error > 1e-9 else np.sign(again - value) * np.inf)
    found = resample(amounts, sizes, resamples=200_000, seed=1)
    assert set(np.round(found.deviations, 6)) == set(np.round(exact, 6))
    for each in set(np.round(exact, 6)):
        share = np.mean(np.array(exact) <= each + 1e-6)
        assert np.mean(found.deviations <= each + 1e-6) == pytest.approx(share, abs=0.005)


def test_bounds_are_infinite_where_resamples_hold_one_file_only() -> None:
    lonely = resample(np.array([1.0] + [0.0] * 11), np.ones(12), resamples=2000, seed=0)
    assert lonely.standard_error > 0 and lonely.interval(0.05) is None


def test_value_is_total_over_total_and_not_a_mean_of_ratios() -> None:
    bits, sizes = [10.0] * 11 + [1000.0], [10.0] * 11 + [100.0]
    found = describe_means(bits, sizes, FILES, alpha=0.05, resamples=500, seed=0)
    assert found.value == pytest.approx(1110 / 210, abs=1e-6)


def test_items_of_one_file_are_drawn_together() -> None:
    names, amounts = [f for f in FILES for _ in range(5)], [float(i % 7) for i in range(60)]
    sums = cluster_sums([amounts], names)[0]
    assert sums.tolist() == [sum(amounts[i * 5 : i * 5 + 5]) for i in range(12)]


def test_interval_of_means_is_that_of_the_central_limit_theorem() -> None:
    rng = np.random.default_rng(0)
    change = rng.normal(0.3, 1.0, 400)
    names = [f"f{i}" for i in range(400)]
    found = compare_means([0.0] * 400, change.tolist(), [1.0] * 400, names, alpha=0.05, resamples=20_000, seed=0)
    error = change.std() / np.sqrt(400)
    z = NormalDist().inv_cdf(0.95) * widening(400)
    assert found.effect.low == pytest.approx(change.mean() - z * error, abs=0.005)
    assert found.effect.high == pytest.approx(change.mean() + z * error, abs=0.005)
    assert found.detectable == pytest.approx(2.4865 * error, rel=0.03)


def test_detectable_effect_is_that_of_the_formula() -> None:
    assert detectable_effect(1.0, 0.05) == pytest.approx(1.644854 + 0.841621, abs=1e-5)


def test_few_files_give_no_interval() -> None:
    some = list(range(MIN_CLUSTERS - 1))
    found = compare_means([1.0] * len(some), [2.0] * len(some), [1.0] * len(some), [str(i) for i in some], 0.05, 100, 0)
    assert (found.effect.value, found.effect.low, found.effect.high, found.detectable) == (1.0, None, None, None)


def test_answers_of_one_file_that_go_together_count_less() -> None:
    before = [0.0] * 200
    files = [f"f{i // 10}" for i in range(200)]
    together = [float(i // 10 % 4 == 0) for i in range(200)]
    apart = [float(i % 4 == 0) for i in range(200)]
    wide, narrow = (compare_answers(before, after, files, 0.05) for after in (together, apart))
    assert wide.effect.value == narrow.effect.value == 0.25
    assert wide.spread is not None and narrow.spread is not None
    assert wide.spread.design_effect > 9 and narrow.spread.design_effect == 1.0
    assert wide.effect.low is not None and narrow.effect.low is not None and wide.effect.low < narrow.effect.low - 0.05
    one, other = (describe_answers(after, files, 0.05) for after in (together, apart))
    assert one.low is not None and other.low is not None and one.low < other.low


def test_no_answer_that_changed_is_not_taken_for_none_that_can() -> None:
    found = compare_answers([1.0] * 50, [1.0] * 50, [f"f{i}" for i in range(50)], 0.05)
    z = NormalDist().inv_cdf(0.95)
    assert found.effect.value == 0.0
    assert found.effect.low == pytest.approx(-(z**2) / (50 + z**2), abs=1e-6)
    assert found.detectable is not None and found.detectable > 0


items = st.lists(
    st.tuples(st.floats(0, 100), st.floats(0, 100), st.floats(1, 50), st.sampled_from(FILES)), min_size=1, max_size=40
)


@settings(max_examples=60, deadline=None)
@given(items, st.randoms(use_true_random=False))
def test_order_of_items_does_not_matter(rows: list[tuple[float, float, float, str]], random: object) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]

    def of(some: list[tuple[float, float, float, str]]) -> object:
        before, after, sizes, names = zip(*some, strict=True)
        return compare_means(before, after, sizes, names, 0.05, 50, 3)

    first, second = of(rows), of(shuffled)
    assert first.num_clusters == second.num_clusters  # type: ignore[attr-defined]
    assert first.effect.value == pytest.approx(second.effect.value, abs=2e-6)  # type: ignore[attr-defined]
    for one, other in ((first.effect.low, second.effect.low), (first.effect.high, second.effect.high)):  # type: ignore[attr-defined]
        assert one == other or one == pytest.approx(other, rel=1e-3, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(items)
def test_swapping_before_and_after_turns_the_effect_round(rows: list[tuple[float, float, float, str]]) -> None:
    before, after, sizes, names = zip(*rows, strict=True)
    there = compare_means(before, after, sizes, names, 0.05, 200, 3).effect
    back = compare_means(after, before, sizes, names, 0.05, 200, 3).effect
    assert there.value == pytest.approx(-back.value, abs=2e-6)
    assert (there.low is None) == (back.high is None)
    if there.low is not None and back.high is not None:
        assert there.low == pytest.approx(-back.high, rel=0.05, abs=1e-4)  # the nearest resample on either side


@settings(max_examples=60, deadline=None)
@given(items)
def test_equal_artifacts_differ_by_exactly_nothing(rows: list[tuple[float, float, float, str]]) -> None:
    before, _, sizes, names = zip(*rows, strict=True)
    found = compare_means(before, before, sizes, names, 0.05, 50, 0).effect
    assert (found.value, found.low or 0.0, found.high or 0.0) == (0.0, 0.0, 0.0)


def test_many_files_are_drawn_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(50.0) ** 2
    whole = resample(values, np.ones(50), 1000, 5)
    monkeypatch.setattr("mansard.evaluation.bootstrap._DRAWS_AT_ONCE", 200)
    parts = resample(values, np.ones(50), 1000, 5)
    assert np.array_equal(whole.deviations, parts.deviations)


def test_files_that_moved_alike_but_for_the_last_digit_have_a_narrow_interval() -> None:
    after = [300.144 + 0.001 * (n % 17 == 0) for n in range(60)]
    names = [f"{n // 3:02d}" for n in range(60)]
    asked = ([300.0] * 60, after, [100.0] * 60, names)
    found = compare_means(*asked, alpha=0.0076, resamples=2000, seed=0, grain=0.001).effect
    assert found.low is not None and found.high is not None
    assert 0.00143 < found.low < found.value < found.high < 0.00146
    assert compare_means(*asked, alpha=0.0076, resamples=2000, seed=0).effect.low is None, "resamples without a spread"
