"""Is the canary worse than stable? A permutation test over sticky keys, per metric; pass, fail or inconclusive.

The unit is the sticky key: one value a key since the step began, minus what that key had before the rollout, so that
users who are always slow or always fail count for nobody. The hash of the key decides who is in the canary. So if both
versions are alike, every set of as many keys was as likely to be it, and exchanging keys gives the exact distribution
of any statistic, however unequal users are, however skewed errors, and however few requests most of them send (Fisher
1935; Lehmann & Romano, Testing Statistical Hypotheses, section 15.2; Phipson & Smyth 2010 for p-values of a sample of
exchanges). The value before as a control: CUPED (Deng, Xu, Kohavi, Walker 2013).

Not a confidence sequence: those (Howard, Ramdas, McAuliffe, Sekhon 2021; Waudby-Smith & Ramdas 2024) need each value to
be new given the past, and here the same keys come back at every look. How often one may look: looks.py.

Does not cover: what aborts whatever the sample (rollout.py). Where stable gets no traffic (weight 100) each key is
compared with itself before, by changing signs; then a change of the whole load between the two counts as the canary's.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt

NEEDED = ("errors", "request")
"""What every request has. Few users may stream, so the other metrics need not be there for a pass."""
MIN_KEYS = 30
"""On each side; below, the answer is inconclusive (issue 5)."""
CHUNK_CELLS = 600_000
"""Exchanges are drawn so many keys at a time: a few megabytes."""
EXCHANGES_PER_ALPHA = 20.0
MAX_EXCHANGES = 50_000
"""Exchanges drawn: so many over alpha, but never so few that none may exceed. With fewer, unlucky draws decide."""
SCREEN = 0.75
"""Exchanges are drawn only above this share of the normal quantile. Leaving them out can only keep from failing."""

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Verdict = Literal["pass", "fail", "inconclusive"]


@dataclass(frozen=True, slots=True)
class Metric:
    """A sum over a count per key. `is_ratio`: compared as canary over stable (its logarithm is tested), else as a
    difference. `weight_requests`: a key with so many requests weighs half of one with very many. `past_requests`: so
    many requests of the usual user are added to what a key did before. `alpha_share`: of a look's alpha.
    """

    name: str
    unit: str
    is_ratio: bool
    weight_requests: float
    past_requests: float
    alpha_share: float


METRICS = (
    Metric("errors", "of requests", False, weight_requests=60.0, past_requests=25.0, alpha_share=0.7),
    Metric("first_token", "s", True, weight_requests=2.0, past_requests=2.0, alpha_share=0.06),
    Metric("per_token", "s", True, weight_requests=20.0, past_requests=20.0, alpha_share=0.06),
    Metric("request", "s", True, weight_requests=2.0, past_requests=2.0, alpha_share=0.06),
    Metric("output", "events", True, weight_requests=2.0, past_requests=2.0, alpha_share=0.06),
    Metric("refused", "of requests", False, weight_requests=60.0, past_requests=25.0, alpha_share=0.06),
)
"""`refused` are an engine's own 4xx: users send as many bad requests to either side (design decision 12).
`request` counts what is unfinished by its age, so a hang is slow long before it ends. Weights and controls trade
power between many light users and few heavy ones; they never touch the level of the test."""


@dataclass(frozen=True, slots=True)
class Limits:
    """`max_error_excess`: tolerated difference of error rates, and of refusals. `slower`: per latency metric the ratio
    that evaluation measured, times the spec's tolerance. `output`: how many times longer or shorter answers may get.
    """

    max_error_excess: float
    slower: dict[str, float]
    output: float


@dataclass(frozen=True, slots=True)
class Sample:
    """One column a sticky key; rows are METRICS. `is_canary` is None where all keys are the canary's and `past_*` is
    what the same keys had on stable (weight 100).
    """

    is_canary: Bools | None
    sums_MK: Floats
    counts_MK: Floats
    past_sums_MK: Floats
    past_counts_MK: Floats


@dataclass(frozen=True, slots=True)
class Finding:
    """One metric at one look. `estimate` and `interval` are a ratio or a difference, `limit` in the same unit.

    `interval` holds at the level that this look spends, so all of them together hold at the rollout's. `smallest` is
    the smallest change that this sample would have shown (for four cases in five).
    """

    metric: str
    verdict: Verdict
    canary_keys: int
    stable_keys: int
    estimate: float
    interval: tuple[float, float]
    limit: float
    smallest: float

    def text(self) -> str:
        """One line for the journal and for people."""
        sides = f"{self.canary_keys} and {self.stable_keys} users"
        if math.isnan(self.estimate):
            return f"{self.metric}: inconclusive, {sides}; {MIN_KEYS} on each side are needed"
        low, high = self.interval
        show = "{:+.1%}".format if self.metric in ("errors", "refused") else "{:.2f}x".format
        return (
            f"{self.metric}: {show(self.estimate)} ({show(low)} to {show(high)}), limit {show(self.limit)}, {sides}, "
            f"smallest change to be seen {show(self.smallest)}: {self.verdict}"
        )


def judge(sample: Sample, limits: Limits, alpha: float, seed: int) -> tuple[Finding, ...]:
    """One finding per metric that any key has. `alpha` is for all of them together at this look; 0 cannot fail."""
    rng = np.random.default_rng(seed)
    findings = []
    for row, metric in enumerate(METRICS):
        if sample.counts_MK[row].any():
            findings += _judge_metric(sample, row, metric, limits, alpha * metric.alpha_share, rng)
    return tuple(findings)


def overall(findings: tuple[Finding, ...]) -> Verdict:
    """Fail where one fails; pass where NEEDED pass and no other metric that enough users have says otherwise."""
    if any(f.verdict == "fail" for f in findings):
        return "fail"
    passed = {f.metric for f in findings if f.verdict == "pass"}
    is_doubted = any(f.verdict == "inconclusive" and not math.isnan(f.estimate) for f in findings)
    return "pass" if passed.issuperset(NEEDED) and not is_doubted else "inconclusive"


def _judge_metric(
    sample: Sample, row: int, metric: Metric, limits: Limits, alpha: float, rng: np.random.Generator
) -> list[Finding]:
    changes, weights, is_canary = _changes(sample, row, metric)
    num_canary = len(changes) if is_canary is None else int(is_canary.sum())
    num_stable = len(changes) if is_canary is None else len(changes) - num_canary
    bounds = _bounds(metric, limits)
    alpha /= len(bounds)
    if min(num_canary, num_stable) < MIN_KEYS:
        shown = math.exp(bounds[0][0]) if metric.is_ratio else limits.max_error_excess
        nothing = (-math.inf, math.inf)
        return [Finding(metric.name, "inconclusive", num_canary, num_stable, math.nan, nothing, shown, math.nan)]
    estimate, error = _estimate(changes, weights, is_canary)
    findings = []
    for bound, sign in bounds:
        null = bound if metric.is_ratio else 0.0
        tolerated = bound if metric.is_ratio else limits.max_error_excess
        is_worse = sign * (estimate - tolerated) > 0
        is_proven = is_worse and alpha > 0 and _is_above(sign * changes, weights, is_canary, sign * null, alpha, rng)
        verdict: Verdict = "fail" if is_proven else "inconclusive" if is_worse else "pass"
        findings.append((verdict, bound))
    worst = next(f for kind in ("fail", "inconclusive", "pass") for f in findings if f[0] == kind)
    quantile = NormalDist().inv_cdf(1 - (alpha or 0.05 * metric.alpha_share))
    show = math.exp if metric.is_ratio else float
    interval = (show(estimate - quantile * error), show(estimate + quantile * error))
    limit = math.exp(worst[1]) if metric.is_ratio else limits.max_error_excess
    smallest = show((worst[1] if metric.is_ratio else 0.0) + (quantile + 0.84) * error)
    return [Finding(metric.name, worst[0], num_canary, num_stable, show(estimate), interval, limit, smallest)]


def _bounds(metric: Metric, limits: Limits) -> list[tuple[float, int]]:
    """(limit, +1 where above it is worse or -1 where below is); logarithms for ratios."""
    if metric.name == "output":
        return [(math.log(limits.output), 1), (-math.log(limits.output), -1)]
    return [(math.log(limits.slower[metric.name]) if metric.is_ratio else limits.max_error_excess, 1)]


def _changes(sample: Sample, row: int, metric: Metric) -> tuple[Floats, Floats, Bools | None]:
    """Per key that has the metric now: its value minus its value before, its weight, its side.

    A key's value before is drawn to `usual`, the mean over keys in which each counts as much as it is drawn: then the
    mean change of users who stay as they were is zero, and users with a very long past, such as a few who asked a dead
    engine again and again, say next to nothing about the others.
    """
    counts, past_counts = sample.counts_MK[row], sample.past_counts_MK[row]
    there = counts > 0 if sample.is_canary is not None else (counts > 0) & (past_counts > 0)
    now = sample.sums_MK[row, there] / counts[there]
    weights = counts[there] / (counts[there] + metric.weight_requests)
    extra, before, sums = metric.past_requests, past_counts[there], sample.past_sums_MK[row, there]
    drawn = np.where(before > 0, weights * extra / (before + extra), 0.0)
    usual = float(np.average(sums / np.maximum(before, 1e-9), weights=drawn)) if drawn.any() else _plain_mean(now)
    past = (sums + extra * usual) / (before + extra)
    if metric.is_ratio:
        now, past = np.log(np.maximum(now, 1e-6)), np.log(np.maximum(past, 1e-6))
    return now - past, weights, None if sample.is_canary is None else sample.is_canary[there]


def _plain_mean(values: Floats) -> float:
    return float(values.mean()) if values.size else 0.0


def _estimate(changes: Floats, weights: Floats, is_canary: Bools | None) -> tuple[float, float]:
    """The canary's mean change minus stable's, and its standard error over keys."""
    if is_canary is None:
        return _mean(changes, weights)
    canary, error = _mean(changes[is_canary], weights[is_canary])
    stable, stable_error = _mean(changes[~is_canary], weights[~is_canary])
    return canary - stable, math.hypot(error, stable_error)


def _mean(values: Floats, weights: Floats) -> tuple[float, float]:
    mean = float(np.average(values, weights=weights))
    return mean, float(np.sqrt(np.sum((weights * (values - mean)) ** 2)) / weights.sum())


def _is_above(
    changes: Floats, weights: Floats, is_canary: Bools | None, null: float, alpha: float, rng: np.random.Generator
) -> bool:
    """Whether the canary's changes exceed stable's by more than `null`, at level `alpha`."""
    if is_canary is None:
        residuals = weights * (changes - null)
        observed, spread = residuals.sum(), math.sqrt(float((residuals**2).sum()))
    else:
        shifted = np.where(is_canary, changes - null, changes)
        residuals = weights * (shifted - np.average(shifted, weights=weights))
        residuals -= residuals.mean()  # weights sum it to zero already, but for rounding
        size, num_keys = int(is_canary.sum()), len(changes)
        observed = residuals[is_canary].sum()
        spread = math.sqrt(size * (num_keys - size) / (num_keys * (num_keys - 1)) * float((residuals**2).sum()))
    if spread == 0 or observed < SCREEN * NormalDist().inv_cdf(1 - alpha) * spread:
        return False
    num_exchanges = math.ceil(max(min(EXCHANGES_PER_ALPHA / alpha, MAX_EXCHANGES), 2 / alpha))
    allowed = math.floor(alpha * (num_exchanges + 1)) - 1
    exceeded = drawn = 0
    while drawn < num_exchanges and exceeded <= allowed:
        batch = min(max(CHUNK_CELLS // len(residuals), 1), num_exchanges - drawn)
        sums = _exchanged(residuals, None if is_canary is None else int(is_canary.sum()), batch, rng)
        exceeded += int(np.count_nonzero(sums >= observed * (1 - 1e-12)))
        drawn += batch
    return exceeded <= allowed


def _exchanged(residuals: Floats, size: int | None, batch: int, rng: np.random.Generator) -> Floats:
    """Sums over `batch` random sets of `size` keys; with None, of all keys with random signs."""
    if size is None:
        signs = rng.integers(0, 2, (batch, len(residuals)), dtype=np.int8) * 2 - 1
        signed: Floats = signs @ residuals
        return signed
    order = rng.random((batch, len(residuals)), dtype=np.float32)
    chosen = np.argpartition(order, size, axis=1)[:, :size]
    sums: Floats = residuals[chosen].sum(axis=1)
    return sums
