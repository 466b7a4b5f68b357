"""Paired comparison of two artifacts' answers to the same items; pure, numpy only.

A suite's value is a ratio of sums: bits over bytes, or right answers over answers. Items of one source file are not
independent, so the file is the unit. Bits per byte and graded answers: bootstrap-t over files (bootstrap.py). Right or
wrong answers: Tango's score interval, with the counts divided by the design effect of the files (score_interval.py).
Every bound is one-sided at `alpha`, so an interval is two-sided at 1 - 2 alpha.

The smallest detectable effect is (z[1 - alpha] + z[0.8]) * standard error: a true difference of that size is told from
none with probability 0.8 by a one-sided test at alpha.

The same numbers in any order give the same result: files are sorted by name, the generator is seeded, sums use no
BLAS, and results are rounded to 6 decimals.
"""

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from mansard.evaluation.bootstrap import Resampled, resample
from mansard.evaluation.comparison import Comparison, Estimate, Spread
from mansard.evaluation.score_interval import design_effect, tango_interval, wilson_interval

MIN_CLUSTERS = 10
"""Below ten files neither a spread nor a design effect is known well enough for any interval."""

POWER = 0.8
DECIMALS = 6

Floats = NDArray[np.float64]


def describe_means(
    amounts: Sequence[float], sizes: Sequence[float], clusters: Sequence[str], alpha: float, resamples: int, seed: int
) -> Estimate:
    """Sum of `amounts` over sum of `sizes` (one of each per item), with its interval."""
    sums, sums_size = cluster_sums([amounts, sizes], clusters)
    if len(sums_size) < MIN_CLUSTERS:
        return Estimate(_rounded(sums.sum() / sums_size.sum()), None, None)
    return _estimate(resample(sums, sums_size, resamples, seed), alpha)


def compare_means(
    before: Sequence[float],
    after: Sequence[float],
    sizes: Sequence[float],
    clusters: Sequence[str],
    alpha: float,
    resamples: int,
    seed: int,
    grain: float = 0.0,
) -> Comparison:
    """Paired, item by item: amounts before and after, their common sizes, and the cluster each item belongs to.

    `grain` is the step to which each amount was rounded.
    """
    sums_before, sums_after, sums_size = cluster_sums([before, after, sizes], clusters)
    columns = (sums_before, sums_after, sums_after - sums_before)
    if len(sums_size) < MIN_CLUSTERS:
        bare = [Estimate(_rounded(c.sum() / sums_size.sum()), None, None) for c in columns]
        return Comparison(len(sizes), len(sums_size), bare[0], bare[1], bare[2], None)
    noises = [n * len(sizes) * grain**2 / 12 for n in (1, 1, 2)]  # a rounded number's variance is a twelfth of a step's
    drawn = [resample(c, sums_size, resamples, seed, noise) for c, noise in zip(columns, noises, strict=True)]
    was, now, effect = (_estimate(d, alpha) for d in drawn)
    error = drawn[2].standard_error
    spread = Spread(_rounded(error * len(sums_size) ** 0.5), None, 1.0)
    detectable = _rounded(detectable_effect(error, alpha))
    return Comparison(len(sizes), len(sums_size), was, now, effect, detectable, spread)


def describe_answers(correct: Sequence[float], clusters: Sequence[str], alpha: float) -> Estimate:
    """The share of right answers (each 0 or 1), with its interval."""
    sums, counts = cluster_sums([correct, [1.0] * len(correct)], clusters)
    share = float(sums.sum() / counts.sum())
    if len(counts) < MIN_CLUSTERS:
        return Estimate(_rounded(share), None, None)
    size = len(correct) / float(design_effect(sums, counts, np.asarray(sums.sum())))
    low, high = wilson_interval(share, size, alpha)
    return Estimate(_rounded(share), _rounded(low), _rounded(high))


def compare_answers(
    before: Sequence[float], after: Sequence[float], clusters: Sequence[str], alpha: float
) -> Comparison:
    """Paired right (1) and wrong (0) answers, and the cluster each item belongs to."""
    gains = [float(a > b) for b, a in zip(before, after, strict=True)]
    losses = [float(a < b) for b, a in zip(before, after, strict=True)]
    sums_gain, sums_loss, counts = cluster_sums([gains, losses, [1.0] * len(gains)], clusters)
    gained, lost, number = float(sums_gain.sum()), float(sums_loss.sum()), float(counts.sum())
    effect = Estimate(_rounded((gained - lost) / number), None, None)
    was, now = (describe_answers(c, clusters, alpha) for c in (before, after))
    if len(counts) < MIN_CLUSTERS:
        return Comparison(len(gains), len(counts), was, now, effect, None)
    inflation = float(design_effect(sums_gain - sums_loss, counts, np.asarray(gained + lost)))
    scaled = [np.array([c / inflation]) for c in (gained, lost, number)]
    low, high = tango_interval(scaled[0], scaled[1], scaled[2], alpha)
    effect = Estimate(effect.value, _rounded(low[0]), _rounded(high[0]))
    # Half an answer added: none seen to change is not the same as none that can.
    error = float(np.sqrt((gained + lost + 0.5) / (number + 1) * inflation / number))
    spread = Spread(None, _rounded((gained + lost) / number), _rounded(inflation))
    return Comparison(len(gains), len(counts), was, now, effect, _rounded(detectable_effect(error, alpha)), spread)


def cluster_sums(columns: Sequence[Sequence[float]], clusters: Sequence[str]) -> list[Floats]:
    """Each column summed per cluster, clusters in the order of their names."""
    names, place = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    sums = [np.bincount(place, weights=np.asarray(c, dtype=np.float64), minlength=len(names)) for c in columns]
    return [s.astype(np.float64) for s in sums]


def detectable_effect(standard_error: float, alpha: float) -> float:
    """See the formula above."""
    normal = NormalDist()
    return (normal.inv_cdf(1 - alpha) + normal.inv_cdf(POWER)) * standard_error


def _estimate(drawn: Resampled, alpha: float) -> Estimate:
    interval = drawn.interval(alpha)
    if interval is None:
        return Estimate(_rounded(drawn.value), None, None)
    return Estimate(_rounded(drawn.value), _rounded(interval[0]), _rounded(interval[1]))


def _rounded(value: float | np.float64) -> float:
    return round(float(value), DECIMALS) + 0.0  # no negative zero
