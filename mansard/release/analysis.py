"""Is the canary worse than stable? A permutation test over sticky keys, per metric; pass, fail or inconclusive.

The unit is the sticky key: one value a key since the step began, minus what that key had before the rollout, so that
users who are always slow or always fail count for nobody. The hash of the key decides who is in the canary. So if both
versions are alike, every set of as many keys was as likely to be it, and exchanging keys gives the exact distribution
of any statistic, however unequal users are, however skewed errors, and however few requests most of them send (Fisher
1935; Lehmann & Romano, Testing Statistical Hypotheses, section 15.2; Phipson & Smyth 2010 for p-values of a sample of
exchanges). The value before as a control: CUPED (Deng, Xu, Kohavi, Walker 2013). Users belong to tenants, and no tenant
moves a statistic or an estimate by more than tenants.py lets it: the level stays exact while every tenant is honest,
and one that is not can neither prove nor hide much. Of one tenant alone users count as they are; the text says so.

Not a confidence sequence: those (Howard, Ramdas, McAuliffe, Sekhon 2021; Waudby-Smith & Ramdas 2024) need each value to
be new given the past, and here the same keys come back at every look. How often one may look: looks.py.

Does not cover: what aborts whatever the sample (rollout.py). Where stable gets no traffic (weight 100) each key is
compared with itself before, by changing signs; then a change of the whole load between the two counts as the canary's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt

from mansard.release.tenants import Tenants, bounds, counted, exchangeable, location, tenants_of

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
Ints = npt.NDArray[np.int64]
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
    what the same keys had on stable (weight 100). `tenant_K` are numbers for the keys' tenants; None: all are one's.
    """

    is_canary: Bools | None
    sums_MK: Floats
    counts_MK: Floats
    past_sums_MK: Floats
    past_counts_MK: Floats
    tenant_K: Ints | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """One metric at one look. `estimate` and `interval` are a ratio or a difference, `limit` in the same unit.

    `interval` holds at the level that this look spends, so all of them together hold at the rollout's. `smallest` is
    the smallest change that this sample would have shown (for four cases in five). `tenants` have these users;
    `has_sole` says that one of them counts in full, because there is nobody else.
    """

    metric: str
    verdict: Verdict
    canary_keys: int
    stable_keys: int
    estimate: float
    interval: tuple[float, float]
    limit: float
    smallest: float
    tenants: int = 1
    has_sole: bool = True

    def text(self) -> str:
        """One line for the journal and for people."""
        sides = f"{self.canary_keys} and {self.stable_keys} users of {self._tenants_text()}"
        if math.isnan(self.estimate):
            return f"{self.metric}: inconclusive, {sides}; {MIN_KEYS} on each side are needed"
        low, high = self.interval
        show = "{:+.1%}".format if self.metric in ("errors", "refused") else "{:.2f}x".format
        return (
            f"{self.metric}: {show(self.estimate)} ({show(low)} to {show(high)}), limit {show(self.limit)}, {sides}, "
            f"smallest change to be seen {show(self.smallest)}: {self.verdict}"
        )

    def _tenants_text(self) -> str:
        if self.tenants == 1:
            return "one tenant, whose users nobody else confirms"
        return f"{self.tenants} tenants" + (", of which one has nearly all" if self.has_sole else "")


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


@dataclass(frozen=True, slots=True)
class _Users:
    """Of one metric, those that have it: the change, weight and side of each, and whose they are."""

    changes: Floats
    weights: Floats
    is_canary: Bools | None
    tenants: Tenants

    def sides(self) -> tuple[int, int]:
        number = len(self.changes)
        num_canary = number if self.is_canary is None else int(self.is_canary.sum())
        return num_canary, number if self.is_canary is None else number - num_canary

    def without(self, tenant: int) -> "_Users":
        rest = self.tenants.of_user_K != tenant
        is_canary = None if self.is_canary is None else self.is_canary[rest]
        return _Users(self.changes[rest], self.weights[rest], is_canary, self.tenants.of(rest))

    def are_enough(self) -> bool:
        """MIN_KEYS on each side, where no tenant counts for more than all others."""
        everybody = np.ones(len(self.changes), dtype=bool)
        sides = [everybody] if self.is_canary is None else [self.is_canary, ~self.is_canary]
        is_sole = self.tenants.sole is not None
        return all(counted(self.tenants.of(side).sums(np.ones(side.sum())), is_sole) >= MIN_KEYS for side in sides)


def _judge_metric(
    sample: Sample, row: int, metric: Metric, limits: Limits, alpha: float, rng: np.random.Generator
) -> list[Finding]:
    users = _users(sample, row, metric)
    num_canary, num_stable = users.sides()
    tests = _bounds(metric, limits)
    alpha /= len(tests)
    numbers = (users.tenants.number, users.tenants.sole is not None)
    if not users.are_enough():
        shown = math.exp(tests[0][0]) if metric.is_ratio else limits.max_error_excess
        nothing = (-math.inf, math.inf)
        return [
            Finding(metric.name, "inconclusive", num_canary, num_stable, math.nan, nothing, shown, math.nan, *numbers)
        ]
    estimate, error = _estimate(users)
    findings = []
    for bound, sign in tests:
        null = bound if metric.is_ratio else 0.0
        tolerated = bound if metric.is_ratio else limits.max_error_excess
        is_worse = sign * (estimate - tolerated) > 0
        is_proven = is_worse and alpha > 0 and _is_above(users, sign, sign * null, sign * tolerated, alpha, rng)
        verdict: Verdict = "fail" if is_proven else "inconclusive" if is_worse else "pass"
        findings.append((verdict, bound))
    worst = next(f for kind in ("fail", "inconclusive", "pass") for f in findings if f[0] == kind)
    quantile = NormalDist().inv_cdf(1 - (alpha or 0.05 * metric.alpha_share))
    show = math.exp if metric.is_ratio else float
    interval = (show(estimate - quantile * error), show(estimate + quantile * error))
    limit = math.exp(worst[1]) if metric.is_ratio else limits.max_error_excess
    smallest = show((worst[1] if metric.is_ratio else 0.0) + (quantile + 0.84) * error)
    return [Finding(metric.name, worst[0], num_canary, num_stable, show(estimate), interval, limit, smallest, *numbers)]


def _bounds(metric: Metric, limits: Limits) -> list[tuple[float, int]]:
    """(limit, +1 where above it is worse or -1 where below is); logarithms for ratios."""
    if metric.name == "output":
        return [(math.log(limits.output), 1), (-math.log(limits.output), -1)]
    return [(math.log(limits.slower[metric.name]) if metric.is_ratio else limits.max_error_excess, 1)]


def _users(sample: Sample, row: int, metric: Metric) -> _Users:
    """Those that have the metric now; a change is the value now minus the value before.

    A key's value before is drawn to `usual`, the mean over keys in which each counts as much as it is drawn: then the
    mean change of users who stay as they were is zero, and users with a very long past, such as a few who asked a dead
    engine again and again, say next to nothing about the others.
    """
    counts, past_counts = sample.counts_MK[row], sample.past_counts_MK[row]
    there = counts > 0 if sample.is_canary is not None else (counts > 0) & (past_counts > 0)
    tenants = tenants_of(None if sample.tenant_K is None else sample.tenant_K[there], int(there.sum()))
    now = sample.sums_MK[row, there] / counts[there]
    weights = counts[there] / (counts[there] + metric.weight_requests)
    extra, before, sums = metric.past_requests, past_counts[there], sample.past_sums_MK[row, there]
    drawn = np.where(before > 0, weights * extra / (before + extra), 0.0)
    usual = _usual(sums / np.maximum(before, 1e-9), drawn, now, tenants)
    past = (sums + extra * usual) / (before + extra)
    if metric.is_ratio:
        now, past = np.log(np.maximum(now, 1e-6)), np.log(np.maximum(past, 1e-6))
    return _Users(now - past, weights, None if sample.is_canary is None else sample.is_canary[there], tenants)


def _usual(before: Floats, drawn: Floats, now: Floats, tenants: Tenants) -> float:
    """The usual user's value: of those with a past, else of all as they are now."""
    if drawn.any():
        return location(before, drawn, tenants)[0]
    return location(now, np.ones(len(now)), tenants)[0] if now.size else 0.0


def _estimate(users: _Users) -> tuple[float, float]:
    """The canary's mean change minus stable's, and its standard error over keys."""
    is_canary = users.is_canary
    if is_canary is None:
        return location(users.changes, users.weights, users.tenants)
    canary, error = location(users.changes[is_canary], users.weights[is_canary], users.tenants.of(is_canary))
    stable, stable_error = location(users.changes[~is_canary], users.weights[~is_canary], users.tenants.of(~is_canary))
    return canary - stable, math.hypot(error, stable_error)


def _is_above(
    users: _Users, sign: int, null: float, tolerated: float, alpha: float, rng: np.random.Generator
) -> bool:
    """Whether the canary's changes (times `sign`) exceed stable's by more than `null`, at level `alpha`, and by more
    than `tolerated` without the tenant that says so most."""
    changes, weights, is_canary, tenants = sign * users.changes, users.weights, users.is_canary, users.tenants
    groups = [] if is_canary is None else exchangeable(tenants)
    if is_canary is None:
        residuals, scales = weights * (changes - null), np.ones(len(changes))
        shares = np.zeros(len(changes))
    else:
        shifted = np.where(is_canary, changes - null, changes)
        residuals = weights * (shifted - location(shifted, weights, tenants)[0])
        shares, scales = np.zeros(len(changes)), np.zeros(len(changes))
        for group in groups:
            size, number = int(is_canary[group].sum()), len(group)
            residuals[group] -= residuals[group].mean()
            shares[group], scales[group] = size / number, size * (number - size) / (number * max(number - 1, 1))
    variances_T = tenants.sums(scales * residuals**2)
    most_T = bounds(variances_T, tenants.sole, as_second=True)
    parts_KT, most = _parts(residuals, tenants, most_T)
    expected = shares @ parts_KT

    def total(sides: Floats) -> Floats:
        """Of sides (or signs), a row each."""
        sums: Floats = np.clip(sides @ parts_KT - expected, -most, most).sum(axis=1)
        return sums

    sides = np.ones(len(changes)) if is_canary is None else is_canary.astype(np.float64)
    observed = float(total(sides[None])[0])
    spread = math.sqrt(float(np.minimum(variances_T, most_T**2).sum()))
    if spread == 0 or observed < SCREEN * NormalDist().inv_cdf(1 - alpha) * spread:
        return False
    if tenants.sole is None:
        others = users.without(int(tenants.sums((sides - shares) * residuals).argmax()))
        if min(others.sides()) and sign * _estimate(others)[0] <= tolerated:
            return False
    return _is_rare(observed, lambda batch: total(_exchanged(sides, groups, batch, rng)), len(changes), alpha)


def _is_rare(observed: float, draw: Callable[[int], Floats], num_keys: int, alpha: float) -> bool:
    """Whether so few of the exchanges' totals are as large that it happens with probability `alpha` at most."""
    num_exchanges = math.ceil(max(min(EXCHANGES_PER_ALPHA / alpha, MAX_EXCHANGES), 2 / alpha))
    allowed = math.floor(alpha * (num_exchanges + 1)) - 1
    exceeded = drawn = 0
    while drawn < num_exchanges and exceeded <= allowed:
        batch = min(max(CHUNK_CELLS // num_keys, 1), num_exchanges - drawn)
        exceeded += int(np.count_nonzero(draw(batch) >= observed * (1 - 1e-12)))
        drawn += batch
    return exceeded <= allowed


def _parts(residuals: Floats, tenants: Tenants, most_T: Floats) -> tuple[Floats, Floats]:
    """A column for each tenant that could exceed its bound, and one for all others; the columns' bounds."""
    bounded = np.flatnonzero(tenants.sums(np.abs(residuals)) > most_T)
    is_own_KT = tenants.of_user_K[:, None] == bounded[None]
    rest = np.where(is_own_KT.any(axis=1), 0.0, residuals)
    parts_KT = np.column_stack([np.where(is_own_KT, residuals[:, None], 0.0), rest])
    return parts_KT, np.append(most_T[bounded], math.inf)


def _exchanged(sides: Floats, groups: list[Ints], batch: int, rng: np.random.Generator) -> Floats:
    """A row of sides for each of `batch` exchanges within the groups; without groups, of random signs."""
    if not groups:
        return (rng.integers(0, 2, (batch, len(sides)), dtype=np.int8) * 2 - 1).astype(np.float64)
    order, rows = rng.random((batch, len(sides)), dtype=np.float32), np.zeros((batch, len(sides)))
    for group in groups:
        size = int(sides[group].sum())
        if 0 < size < len(group):
            chosen = group[np.argpartition(order[:, group], size, axis=1)[:, :size]]
            np.put_along_axis(rows, chosen, 1.0, axis=1)
        elif size:
            rows[:, group] = 1.0
    return rows
