"""Paired comparison of two artifacts' answers to the same items; pure, numpy only.

A suite's value is a ratio of sums: bits over bytes, or right answers over answers. Items of one source file are not
independent, so whole files (clusters) are drawn with replacement: a paired cluster bootstrap (Efron and Tibshirani
1993, chapter 8), with percentile intervals, two-sided at 1 - 2 alpha. Percentile intervals are too narrow where
clusters are few; below MIN_CLUSTERS none is given.

The smallest detectable effect is (z[1 - alpha] + z[0.8]) * standard error: a true difference of that size is told from
none with probability 0.8 by a one-sided test at alpha.

The same numbers in any order give the same result: clusters are sorted by name, the generator is seeded, sums use no
BLAS, and results are rounded to 6 decimals.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

MIN_CLUSTERS = 10
"""Below ten clusters a resample often leaves out a tenth of the data or more, and percentiles mean nothing."""

POWER = 0.8
DECIMALS = 6
_DRAWS_AT_ONCE = 1 << 21

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its interval; `low` and `high` are None where there are too few clusters."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two artifacts on one suite. `effect` is after - before, in the suite's own unit and direction."""

    num_items: int
    num_clusters: int
    before: Estimate
    after: Estimate
    effect: Estimate
    detectable: float | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def describe(
    amounts: Sequence[float], sizes: Sequence[float], clusters: Sequence[str], alpha: float, resamples: int, seed: int
) -> Estimate:
    """Sum of `amounts` over sum of `sizes` (one of each per item), with its interval."""
    return compare(amounts, amounts, sizes, clusters, alpha, resamples, seed).after


def compare(
    before: Sequence[float],
    after: Sequence[float],
    sizes: Sequence[float],
    clusters: Sequence[str],
    alpha: float,
    resamples: int,
    seed: int,
) -> Comparison:
    """Paired, item by item: amounts before and after, their common sizes, and the cluster each item belongs to."""
    sums_before, sums_after, sums_size = cluster_sums([before, after, sizes], clusters)
    value_before = float(sums_before.sum() / sums_size.sum())
    value_after = float(sums_after.sum() / sums_size.sum())
    point = (value_before, value_after, value_after - value_before)
    if len(sums_size) < MIN_CLUSTERS:
        estimates = [Estimate(_rounded(v), None, None) for v in point]
        return Comparison(len(sizes), len(sums_size), estimates[0], estimates[1], estimates[2], None)
    drawn_before, drawn_after = resampled_ratios(sums_before, sums_after, sums_size, resamples, seed)
    drawn = (drawn_before, drawn_after, drawn_after - drawn_before)
    estimates = [
        Estimate(_rounded(v), *(_rounded(q) for q in np.quantile(d, [alpha, 1 - alpha])))
        for v, d in zip(point, drawn, strict=True)
    ]
    detectable = _rounded(detectable_effect(float(drawn[2].std(ddof=1)), alpha))
    return Comparison(len(sizes), len(sums_size), estimates[0], estimates[1], estimates[2], detectable)


def cluster_sums(columns: Sequence[Sequence[float]], clusters: Sequence[str]) -> list[Floats]:
    """Each column summed per cluster, clusters in the order of their names."""
    names, place = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    sums = [np.bincount(place, weights=np.asarray(c, dtype=np.float64), minlength=len(names)) for c in columns]
    return [s.astype(np.float64) for s in sums]


def resampled_ratios(before: Floats, after: Floats, sizes: Floats, resamples: int, seed: int) -> tuple[Floats, Floats]:
    """Both ratios in each resample, from the same drawn clusters; memory is bounded whatever their number."""
    generator = np.random.default_rng(seed)
    at_once = max(1, _DRAWS_AT_ONCE // len(sizes))
    parts: list[tuple[Floats, Floats]] = []
    for start in range(0, resamples, at_once):
        drawn = generator.integers(0, len(sizes), size=(min(at_once, resamples - start), len(sizes)))
        size = sizes[drawn].sum(axis=1)
        parts.append((before[drawn].sum(axis=1) / size, after[drawn].sum(axis=1) / size))
    return np.concatenate([b for b, _ in parts]), np.concatenate([a for _, a in parts])


def detectable_effect(standard_error: float, alpha: float) -> float:
    """See the formula above."""
    normal = NormalDist()
    return (normal.inv_cdf(1 - alpha) + normal.inv_cdf(POWER)) * standard_error


def _rounded(value: float) -> float:
    return round(float(value), DECIMALS) + 0.0  # no negative zero
