"""Tango's interval against a direct search for the most likely table, and laws."""

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mansard.evaluation.score_interval import design_effect, tango_interval, tango_statistic, wilson_interval


def one(value: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array([float(value)])


def bounds(gains: float, losses: float, pairs: float, alpha: float = 0.05) -> tuple[float, float]:
    low, high = tango_interval(one(gains), one(losses), one(pairs), alpha)
    return float(low[0]), float(high[0])


@pytest.mark.parametrize(("gains", "losses", "pairs"), [(12, 2, 50), (0, 1, 44), (5, 20, 120), (3, 3, 30), (1, 0, 10)])
@pytest.mark.parametrize("difference", [-0.3, -0.05, 0.02, 0.4])
def test_statistic_is_that_of_the_most_likely_table(gains: int, losses: int, pairs: int, difference: float) -> None:
    """The chance of a loss under a given difference, by a fine search, and the score's variance at it."""
    lost = np.linspace(max(0.0, -difference), min(1.0, (1 - difference) / 2), 400_001)[1:-1]
    gained = lost + difference
    inside = (gained > 0) & (1 - lost - gained > 0)
    lost, gained = lost[inside], gained[inside]
    likely = gains * np.log(gained) + losses * np.log(lost) + (pairs - gains - losses) * np.log(1 - lost - gained)
    best = lost[np.argmax(likely)]
    variance = pairs * (2 * best + difference - difference**2)
    wanted = (gains - losses - pairs * difference) / variance**0.5
    assert tango_statistic(one(gains), one(losses), one(pairs), one(difference))[0] == pytest.approx(wanted, rel=1e-3)


def test_statistic_of_no_difference_is_mcnemars() -> None:
    assert tango_statistic(one(12), one(5), one(60), one(0))[0] == pytest.approx((12 - 5) / 17**0.5)


def test_no_discordant_pair_leaves_the_known_closed_form() -> None:
    z = NormalDist().inv_cdf(0.95)
    assert bounds(0, 0, 50) == pytest.approx((-(z**2) / (50 + z**2), z**2 / (50 + z**2)), abs=1e-9)


counts = st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(1, 200))


@settings(max_examples=200, deadline=None)
@given(counts, st.floats(0.001, 0.3))
def test_interval_holds_the_estimate_and_turns_round_with_gains_and_losses(
    found: tuple[int, int, int], alpha: float
) -> None:
    gains, losses, same = found
    pairs = gains + losses + same
    low, high = bounds(gains, losses, pairs, alpha)
    assert -1 <= low <= (gains - losses) / pairs + 1e-9 and (gains - losses) / pairs - 1e-9 <= high <= 1
    assert bounds(losses, gains, pairs, alpha) == pytest.approx((-high, -low), abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(counts)
def test_fewer_pairs_with_the_same_shares_know_less(found: tuple[int, int, int]) -> None:
    gains, losses, same = found
    low, high = bounds(gains, losses, gains + losses + same)
    wide_low, wide_high = bounds(gains / 2, losses / 2, (gains + losses + same) / 2)
    assert wide_low <= low + 1e-9 and high <= wide_high + 1e-9


def test_wilson_interval_is_the_published_one() -> None:
    """Newcombe 1998, table I: 81 of 263, 95 %: 0.2553 to 0.3662."""
    low, high = wilson_interval(81 / 263, 263, 0.025)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


def test_design_effect_is_one_for_files_of_one_item_and_near_the_size_for_files_that_agree() -> None:
    changes = np.tile([1.0, -1.0, 0.0, 1.0], 25)
    ones = np.ones(100)
    assert design_effect(changes, ones, np.asarray((changes**2).sum())) == 1.0
    agreed = design_effect(changes * 5, ones * 5, np.asarray(5 * (changes**2).sum()))
    assert 5.0 <= agreed <= 5.4
