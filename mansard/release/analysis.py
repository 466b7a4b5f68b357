"""Is the canary worse than stable? A plain comparison of error rates with its n; pass, fail or inconclusive.

A rescue (the router asked stable after the canary failed, before the first byte) is an error of the version that
failed. A stable that had no traffic is taken as faultless, so that missing data never helps the canary. Does not
cover: latency, the sticky key as the unit, looking many times at one sample (a later issue); until then the verdict
is only read once the step's minimum sample is there.
"""

import math
from dataclasses import dataclass
from typing import Literal

Z_90 = 1.6448536269514722
"""Standard normal quantile at 0.95: two-sided 90 %."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What the router workers saw of one version: finished requests, and those of them that failed."""

    requests: int = 0
    errors: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.errors <= self.requests, f"{self.errors} errors in {self.requests} requests"

    @property
    def error_rate(self) -> float:
        return self.errors / self.requests if self.requests else 0.0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.requests + other.requests, self.errors + other.errors)


@dataclass(frozen=True, slots=True)
class Comparison:
    """`excess` is the canary's error rate minus stable's; `interval` its two-sided 90 % interval (Newcombe)."""

    verdict: Literal["pass", "fail", "inconclusive"]
    canary: Counts
    stable: Counts
    excess: float
    interval: tuple[float, float]
    max_error_excess: float

    def text(self) -> str:
        low, high = self.interval
        return (
            f"canary {self.canary.errors} of {self.canary.requests} failed, stable {self.stable.errors} of "
            f"{self.stable.requests}: {self.excess:+.1%} (90 %: {low:+.1%} to {high:+.1%}), "
            f"allowed {self.max_error_excess:+.1%}"
        )


def compare(canary: Counts, stable: Counts, min_requests: int, max_error_excess: float) -> Comparison:
    """Inconclusive below `min_requests` on the canary; else fail where the excess is above `max_error_excess`."""
    excess = canary.error_rate - stable.error_rate
    verdict: Literal["pass", "fail", "inconclusive"]
    if canary.requests < max(min_requests, 1):
        verdict = "inconclusive"
    else:
        verdict = "fail" if excess > max_error_excess else "pass"
    return Comparison(verdict, canary, stable, excess, difference_interval(canary, stable), max_error_excess)


def difference_interval(canary: Counts, stable: Counts) -> tuple[float, float]:
    """Newcombe (1998), Statistics in Medicine 17, method 10: from the Wilson intervals of the two rates."""
    low_c, high_c = wilson_interval(canary)
    low_s, high_s = wilson_interval(stable)
    excess = canary.error_rate - stable.error_rate
    below = math.hypot(canary.error_rate - low_c, high_s - stable.error_rate)
    above = math.hypot(high_c - canary.error_rate, stable.error_rate - low_s)
    return max(excess - below, -1.0), min(excess + above, 1.0)


def wilson_interval(counts: Counts) -> tuple[float, float]:
    """Wilson (1927), two-sided 90 %; the whole unit interval without data."""
    n = counts.requests
    if n == 0:
        return 0.0, 1.0
    rate, square = counts.error_rate, Z_90 * Z_90
    middle = (rate + square / (2 * n)) / (1 + square / n)
    half = Z_90 / (1 + square / n) * math.sqrt(rate * (1 - rate) / n + square / (4 * n * n))
    return min(max(middle - half, 0.0), rate), max(min(middle + half, 1.0), rate)
