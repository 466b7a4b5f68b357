"""The paired cluster bootstrap against brute force, known values and simulated coverage."""

import itertools
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mansard.evaluation.statistics import (
    MIN_CLUSTERS,
    cluster_sums,
    compare,
    describe,
    detectable_effect,
    resampled_ratios,
)

FILES = [f"file{i:02d}" for i in range(12)]


def test_resampled_ratios_have_the_exact_mean_and_spread_of_all_resamples() -> None:
    before, after, sizes = np.array([3.0, 1.0, 4.0]), np.array([2.0, 1.5, 4.5]), np.array([1.0, 2.0, 1.0])
    exact = [
        after[list(drawn)].sum() / sizes[list(drawn)].sum() - before[list(drawn)].sum() / sizes[list(drawn)].sum()
        for drawn in itertools.product(range(3), repeat=3)
    ]
    drawn_before, drawn_after = resampled_ratios(before, after, sizes, resamples=200_000, seed=1)
    drawn = drawn_after - drawn_before
    assert drawn.mean() == pytest.approx(np.mean(exact), abs=0.003)
    assert drawn.std() == pytest.approx(np.std(exact), rel=0.01)
    assert sorted(set(np.round(drawn, 9))) == sorted(set(np.round(exact, 9)))


def test_value_is_total_over_total_and_not_a_mean_of_ratios() -> None:
    bits, sizes = [10.0] * 11 + [1000.0], [10.0] * 11 + [100.0]
    found = describe(bits, sizes, FILES, alpha=0.05, resamples=500, seed=0)
    assert found.value == pytest.approx(1110 / 210, abs=1e-6)


def test_items_of_one_file_are_drawn_together() -> None:
    names, amounts = [f for f in FILES for _ in range(5)], [float(i % 7) for i in range(60)]
    sums = cluster_sums([amounts], names)[0]
    assert sums.tolist() == [sum(amounts[i * 5 : i * 5 + 5]) for i in range(12)]


def test_interval_of_means_is_that_of_the_central_limit_theorem() -> None:
    rng = np.random.default_rng(0)
    change = rng.normal(0.3, 1.0, 400)
    names = [f"f{i}" for i in range(400)]
    found = compare([0.0] * 400, change.tolist(), [1.0] * 400, names, alpha=0.05, resamples=20_000, seed=0)
    error = change.std() / np.sqrt(400)
    z = NormalDist().inv_cdf(0.95)
    assert found.effect.low == pytest.approx(change.mean() - z * error, abs=0.004)
    assert found.effect.high == pytest.approx(change.mean() + z * error, abs=0.004)
    assert found.detectable == pytest.approx(2.4865 * error, rel=0.03)


def test_detectable_effect_is_that_of_the_formula() -> None:
    assert detectable_effect(1.0, 0.05) == pytest.approx(1.644854 + 0.841621, abs=1e-5)


def test_few_files_give_no_interval() -> None:
    some = list(range(MIN_CLUSTERS - 1))
    found = compare([1.0] * len(some), [2.0] * len(some), [1.0] * len(some), [str(i) for i in some], 0.05, 100, 0)
    assert (found.effect.value, found.effect.low, found.effect.high, found.detectable) == (1.0, None, None, None)


def test_intervals_of_clustered_items_cover_the_truth() -> None:
    """300 worlds of 100 skewed files; 90 % intervals cover in 90 % give or take three Monte-Carlo standard errors."""
    rng = np.random.default_rng(7)
    covered, worlds, truth = 0, 300, 0.05
    for _ in range(worlds):
        per_file = rng.integers(1, 6, 100)
        names = np.repeat([f"f{i}" for i in range(100)], per_file).tolist()
        sizes = rng.lognormal(6.0, 0.5, len(names))
        shared = np.repeat(rng.normal(0.0, 0.1, 100), per_file)
        before = sizes * 2.0
        after = sizes * (2.0 + truth + shared + rng.normal(0, 0.05, len(names)))
        found = compare(before.tolist(), after.tolist(), sizes.tolist(), names, 0.05, 400, 0).effect
        assert found.low is not None and found.high is not None
        covered += found.low <= truth <= found.high
    error = (0.9 * 0.1 / worlds) ** 0.5
    assert abs(covered / worlds - 0.9) <= 3 * error, covered / worlds


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
        return compare(before, after, sizes, names, 0.05, 50, 3)

    first, second = of(rows), of(shuffled)
    assert first.num_clusters == second.num_clusters  # type: ignore[attr-defined]
    assert first.effect.value == pytest.approx(second.effect.value, abs=2e-6)  # type: ignore[attr-defined]
    if first.effect.low is not None:  # type: ignore[attr-defined]
        assert first.effect.low == pytest.approx(second.effect.low, abs=2e-6)  # type: ignore[attr-defined]


@settings(max_examples=60, deadline=None)
@given(items)
def test_swapping_before_and_after_turns_the_effect_round(rows: list[tuple[float, float, float, str]]) -> None:
    before, after, sizes, names = zip(*rows, strict=True)
    there = compare(before, after, sizes, names, 0.05, 200, 3).effect
    back = compare(after, before, sizes, names, 0.05, 200, 3).effect
    assert there.value == pytest.approx(-back.value, abs=2e-6)
    if there.low is not None and back.high is not None:
        assert there.low == pytest.approx(-back.high, abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(items)
def test_equal_artifacts_differ_by_exactly_nothing(rows: list[tuple[float, float, float, str]]) -> None:
    before, _, sizes, names = zip(*rows, strict=True)
    found = compare(before, before, sizes, names, 0.05, 50, 0).effect
    assert (found.value, found.low or 0.0, found.high or 0.0) == (0.0, 0.0, 0.0)


def test_many_files_are_drawn_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(50.0)
    whole = resampled_ratios(values, values * 2, np.ones(50), 1000, 5)
    monkeypatch.setattr("mansard.evaluation.statistics._DRAWS_AT_ONCE", 200)
    parts = resampled_ratios(values, values * 2, np.ones(50), 1000, 5)
    assert np.array_equal(whole[0], parts[0]) and np.array_equal(whole[1], parts[1])
