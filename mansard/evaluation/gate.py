"""The gate: from paired comparisons to pass, fail or inconclusive. Pure.

A guard passes when its interval shows that no more than `margin` was lost, against the baseline and against the anchor;
a target passes when its interval shows that more than `margin` was gained over the baseline. Where the whole interval
lies on the wrong side of that bound the suite fails. Anything else is inconclusive, and inconclusive never promotes.
Each guard is judged at alpha and all must pass (each is a claim of its own: intersection-union); targets share alpha by
Holm's method, and all must improve or any, as the spec says. Right/wrong suites gate only where the baseline stands at
least 15 points above chance. No data is never a pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from mansard.evaluation.comparison import Comparison

Role = Literal["target", "guard", "report"]
Verdict = Literal["pass", "fail", "inconclusive", "baseline"]

POINTS_ABOVE_CHANCE = 0.15
"""A model nearer to chance answers by luck: it has nothing to lose there, and a gain is noise (issue 3)."""

HIGHER_IS_BETTER = {"bits_per_byte": False, "accuracy": True}


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of one suite. `chance` matters for accuracy only. A comparison is None where records are absent.
    `level` is the one-sided level of its bounds."""

    suite: str
    measure: str
    role: Role
    margin: float
    chance: float
    baseline: Comparison | None
    anchor: Comparison | None
    level: float


@dataclass(frozen=True, slots=True)
class Ruling:
    """The gate's word on one suite. `gates` is False where it is only reported; `verdict` then counts for nothing."""

    suite: str
    gates: bool
    verdict: Verdict
    reason: str


def rule(evidence: Evidence) -> Ruling:
    """One suite's ruling."""
    if evidence.role == "report":
        return Ruling(evidence.suite, False, "inconclusive", "reported only: its role in the spec is report")
    if evidence.baseline is None:
        return Ruling(evidence.suite, True, "inconclusive", "the baseline has no records on this suite")
    before = evidence.baseline.before.value
    if evidence.measure == "accuracy" and before < round(evidence.chance + POINTS_ABOVE_CHANCE, 9):
        reason = (
            f"reported only: the baseline's {100 * before:.1f} % is less than {100 * POINTS_ABOVE_CHANCE:.0f} points "
            f"above chance ({100 * evidence.chance:.1f} %)"
        )
        return Ruling(evidence.suite, False, "inconclusive", reason)
    if evidence.role == "target":
        verdict, reason = _beyond(evidence, evidence.baseline, "baseline")
        return Ruling(evidence.suite, True, verdict, reason)
    rulings = [_beyond(evidence, evidence.baseline, "baseline")]
    if evidence.anchor is None:
        rulings.append(("inconclusive", "the anchor has no records on this suite"))
    else:
        rulings.append(_beyond(evidence, evidence.anchor, "anchor"))
    worst = worst_of([v for v, _ in rulings])
    return Ruling(evidence.suite, True, worst, "; ".join(reason for _, reason in rulings))


def decide(
    rulings: Sequence[Ruling], evidence: Sequence[Evidence], targets: Literal["all", "any"] = "all"
) -> tuple[Verdict, str]:
    """The verdict over all suites, and why; `rulings` and `evidence` are in the same order."""
    if not evidence:
        return "inconclusive", "no suite was evaluated"
    gating = [r for r in rulings if r.gates]
    if not gating:
        return "inconclusive", "no suite gates, so nothing is shown"
    aims = [r for r, e in zip(rulings, evidence, strict=True) if e.role == "target"]
    counted = [r for r, e in zip(rulings, evidence, strict=True) if r.gates and e.role != "target"]
    aiming = [r for r in aims if r.gates]
    best = best_of([r.verdict for r in aiming]) if aiming else "inconclusive"
    counted += aiming if targets == "all" else [r for r in aiming if r.verdict == best]
    worst = worst_of([r.verdict for r in counted])
    named = ", ".join(r.suite for r in counted if r.verdict == worst)
    if worst == "fail":
        return "fail", f"failed: {named}"
    if worst == "inconclusive":
        return "inconclusive", f"not known well enough: {named}"
    if aims and not aiming:
        return "inconclusive", "the spec has targets, but none of them can gate"
    if targets == "all" and len(aiming) < len(aims):
        mute = ", ".join(r.suite for r in aims if not r.gates)
        return "inconclusive", f"all targets must improve, but not every one can gate: {mute}"
    if len(counted) < len(gating):
        return "pass", "every guard passed, and of the targets " + ", ".join(
            r.suite for r in aiming if r.verdict == best
        )
    return "pass", f"all {len(gating)} gating suites passed"


def holm_levels(passes: Sequence[Callable[[float], bool]], alpha: float) -> list[float]:
    """The level that each target is judged at: alpha over how many are still open when its turn comes (Holm 1979).

    `passes[i]` says whether target i passes at a level; what passes at one level passes at every higher one.
    """
    levels = [alpha] * len(passes)
    still_open = list(range(len(passes)))
    while still_open:
        level = alpha / len(still_open)
        shown = [i for i in still_open if passes[i](level)]
        for i in still_open:
            levels[i] = level
        if not shown:
            break
        still_open = [i for i in still_open if i not in shown]
    return levels


_ORDER: tuple[Verdict, ...] = ("fail", "inconclusive", "pass")


def worst_of(verdicts: Sequence[Verdict]) -> Verdict:
    """fail before inconclusive before pass."""
    return min(verdicts, key=_ORDER.index)


def best_of(verdicts: Sequence[Verdict]) -> Verdict:
    """pass before inconclusive before fail."""
    return max(verdicts, key=_ORDER.index)


def gain_interval(comparison: Comparison, measure: str) -> tuple[float, float] | None:
    """The interval of the change, turned so that more is better; None where there is none."""
    low, high = comparison.effect.low, comparison.effect.high
    if low is None or high is None:
        return None
    return (low, high) if HIGHER_IS_BETTER[measure] else (-high, -low)


def _beyond(evidence: Evidence, comparison: Comparison, against: str) -> tuple[Verdict, str]:
    interval = gain_interval(comparison, evidence.measure)
    if interval is None:
        return "inconclusive", f"{comparison.num_clusters} source files are too few for an interval"
    low, high = interval
    if evidence.role == "target":
        size = f" of more than {evidence.margin:g}" if evidence.margin else ""
        wanted = f"a gain{size} over the {against}"
        passes, fails = low > evidence.margin, high <= evidence.margin
    else:
        wanted = f"no loss of more than {evidence.margin:g} against the {against}"
        passes, fails = low >= -evidence.margin, high < -evidence.margin
    if passes:
        return "pass", f"{wanted} is shown"
    if fails:
        return "fail", f"{wanted} is ruled out"
    return "inconclusive", f"{wanted} is neither shown nor ruled out"
