"""The report of a verdict: Markdown, summary first. Pure; the same results give the same bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mansard.evaluation.gate import HIGHER_IS_BETTER, Evidence, Ruling, Verdict
from mansard.evaluation.pairing import Change
from mansard.evaluation.statistics import Comparison, Estimate

ITEMS_SHOWN = 5
"""Changed items listed for the worse, and as many for the better."""


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """All that is known of one suite. `changes` are against the baseline, the greatest loss first."""

    evidence: Evidence
    ruling: Ruling
    after: Estimate
    num_items: int
    num_clusters: int
    changes: Sequence[Change]


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict and what it rests on. `alpha` is the one-sided level that was spent."""

    verdict: Verdict
    reason: str
    alpha: float
    attempts: Mapping[str, Any]
    suites: Sequence[SuiteResult]
    inputs: Mapping[str, Mapping[str, str]]
    notes: Sequence[str]


def render(judgement: Judgement) -> str:
    """report.md; it shows chart.png, which lies beside it."""
    parts = [
        f"# Verdict: {judgement.verdict}\n",
        f"{judgement.reason[0].upper()}{judgement.reason[1:]}.\n",
        *[f"- {_headline(s, judgement.alpha)}" for s in judgement.suites],
        "",
        *[f"Note: {note}\n" for note in judgement.notes],
        "![Before and after, and the change with its interval](chart.png)\n",
        _table(judgement),
        _attempts(judgement),
        *[_section(s, judgement.alpha) for s in judgement.suites],
        _inputs(judgement),
    ]
    return "\n".join(parts).rstrip() + "\n"


def value_text(value: float, measure: str) -> str:
    """A suite's value in its unit."""
    return f"{value:.4f}" if measure == "bits_per_byte" else f"{100 * value:.1f} %"


def change_text(value: float, measure: str) -> str:
    """A difference of two values, always with its sign; percentages differ by points."""
    return f"{value:+.4f}" if measure == "bits_per_byte" else f"{100 * value:+.1f}"


def amount_text(amount: float, measure: str) -> str:
    """A margin in its unit."""
    return f"{amount:g}" if measure == "bits_per_byte" else f"{100 * amount:g} points"


def unit_of(measure: str) -> str:
    return "bits per byte" if measure == "bits_per_byte" else "right answers"


def interval_text(estimate: Estimate, measure: str) -> str:
    if estimate.low is None or estimate.high is None:
        return "too few files"
    return f"{change_text(estimate.low, measure)} to {change_text(estimate.high, measure)}"


def level_text(alpha: float) -> str:
    """The two-sided level of the intervals, e.g. 90 %."""
    return f"{100 * (1 - 2 * alpha):.4g} %"


def outcome_of(result: SuiteResult) -> str:
    """The word in the verdict column."""
    return result.ruling.verdict if result.ruling.gates or result.ruling.verdict == "baseline" else "reported"


def _headline(result: SuiteResult, alpha: float) -> str:
    evidence, measure = result.evidence, result.evidence.measure
    name = f"**{evidence.suite}** ({evidence.role}): "
    if evidence.baseline is None:
        value, low, high = result.after.value, result.after.low, result.after.high
        spread = ""
        if low is not None and high is not None:
            spread = f" ({level_text(alpha)} interval {value_text(low, measure)} to {value_text(high, measure)})"
        return f"{name}{value_text(value, measure)} {unit_of(measure)}{spread}"
    b = evidence.baseline
    return (
        f"{name}{value_text(b.before.value, measure)} to {value_text(b.after.value, measure)} {unit_of(measure)}, "
        f"{_direction(b, measure)} ({level_text(alpha)} interval of the change {interval_text(b.effect, measure)}): "
        f"{outcome_of(result)}"
    )


def _direction(comparison: Comparison, measure: str) -> str:
    effect = comparison.effect
    if effect.low is None or effect.high is None:
        return "not known whether better"
    if effect.low <= 0 <= effect.high:
        return "no change shown"
    return "better" if (effect.value > 0) == HIGHER_IS_BETTER[measure] else "worse"


def _table(judgement: Judgement) -> str:
    level = level_text(judgement.alpha)
    lines = [
        f"| suite | role | items (files) | before | after | change | {level} interval | margin | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in judgement.suites:
        evidence, measure, b = result.evidence, result.evidence.measure, result.evidence.baseline
        cells = [
            evidence.suite,
            evidence.role,
            f"{result.num_items} ({result.num_clusters})",
            value_text(b.before.value, measure) if b else "-",
            value_text(result.after.value, measure),
            change_text(b.effect.value, measure) if b else "-",
            interval_text(b.effect, measure) if b else "-",
            amount_text(evidence.margin, measure) if evidence.role != "report" else "-",
            outcome_of(result),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _attempts(judgement: Judgement) -> str:
    number = judgement.attempts.get("number", 1)
    return (
        f"Attempt {number} on these suites since the last promotion; each bound is judged at a one-sided level of "
        f"{judgement.alpha:g}.\n"
    )


def _section(result: SuiteResult, alpha: float) -> str:
    evidence, measure = result.evidence, result.evidence.measure
    better = "higher" if HIGHER_IS_BETTER[measure] else "lower"
    lines = [f"## {evidence.suite}\n", f"{unit_of(measure).capitalize()}, {better} is better. {_ruling(result)}\n"]
    if measure == "accuracy" and evidence.chance:
        lines.append(f"A blind guess is right in {100 * evidence.chance:.1f} %.\n")
    if evidence.baseline is not None:
        lines.append(f"- {_against('baseline', evidence.baseline, measure, alpha)}")
    if evidence.anchor is not None and evidence.anchor == evidence.baseline:
        lines.append("- against the anchor: the same")
    elif evidence.anchor is not None:
        lines.append(f"- {_against('anchor', evidence.anchor, measure, alpha)}")
    if result.changes:
        lines += ["", *_changed(result.changes, measure)]
    return "\n".join(lines) + "\n"


def _ruling(result: SuiteResult) -> str:
    return f"{outcome_of(result).capitalize()}: {result.ruling.reason.removeprefix('reported only: ')}."


def _against(against: str, comparison: Comparison, measure: str, alpha: float) -> str:
    least = (
        f"; the smallest change that this could tell from none is {change_text(comparison.detectable, measure)[1:]}"
        if comparison.detectable is not None
        else ""
    )
    return (
        f"against the {against}: {value_text(comparison.before.value, measure)} to "
        f"{value_text(comparison.after.value, measure)}, change {change_text(comparison.effect.value, measure)}, "
        f"{level_text(alpha)} interval {interval_text(comparison.effect, measure)}, "
        f"n = {comparison.num_items} items of {comparison.num_clusters} files{least}"
    )


def _changed(changed: Sequence[Change], measure: str) -> list[str]:
    worse = [c for c in changed if c.gain < 0]
    better = sorted((c for c in changed if c.gain > 0), key=lambda c: (-c.gain, c.item))
    lines = [
        f"{len(better)} items got better, {len(worse)} worse. Those that changed most:\n",
        "| item | file | before | after |",
        "|---|---|---|---|",
    ]
    for change in (*worse[:ITEMS_SHOWN], *better[:ITEMS_SHOWN]):
        lines.append(f"| {_cell(change.item)} | {_cell(change.cluster)} | {change.before} | {change.after} |")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _inputs(judgement: Judgement) -> str:
    who = [w for w, suites in judgement.inputs.items() if suites]
    lines = ["## Item records\n", f"| suite | {' | '.join(who)} |", "|---" * (len(who) + 1) + "|"]
    for result in judgement.suites:
        name = result.evidence.suite
        cells = [f"`{judgement.inputs[w][name][:12]}`" if name in judgement.inputs[w] else "-" for w in who]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
