"""What reports say, in words and rows: Markdown, HTML and chart share it. Pure."""

from collections.abc import Sequence

from mansard.evaluation.gate import HIGHER_IS_BETTER
from mansard.evaluation.judgement import Background, Judgement, SuiteResult, outcome_of
from mansard.evaluation.pairing import Change
from mansard.evaluation.statistics import Comparison, Estimate

ITEMS_SHOWN = 10
"""Changed items listed for the worse, and as many for the better."""
COST_ELSEWHERE = "A measurement, so it is kept beside this record: `mansard review` and MLflow show it."
"""Stands in the report for the cost, which would make a verdict record differ from its repeat."""


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


def headline(result: SuiteResult) -> str:
    """One suite in one line."""
    evidence, measure, alpha = result.evidence, result.evidence.measure, result.evidence.level
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


def attempts_text(judgement: Judgement) -> str:
    """Which attempt this was, and what it was judged at."""
    number = judgement.attempts.get("number", 1)
    return (
        f"Attempt {number} on these suites since the last promotion; each bound is judged at a one-sided level of "
        f"{judgement.alpha:.4g} (6 * {judgement.budget:g} / (pi^2 * {number}^2), so that all attempts together spend "
        f"{judgement.budget:g}); targets share it by Holm's method."
    )


def expected_text(result: SuiteResult) -> str | None:
    """What the spec expected of a guard, beside what was seen."""
    found = result.evidence.baseline.spread if result.evidence.baseline else None
    if result.evidence.role != "guard" or found is None:
        return None
    expected, plan = result.expected, result.plan
    told = f"expected power at no change {plan.power:.2f} with {plan.size} {plan.unit}"
    if found.discordance is not None:
        return (
            f"{told}; discordance expected {expected.expected_discordance:g}, seen {found.discordance:.3f}; design "
            f"effect expected {expected.expected_design_effect:g}, seen {found.design_effect:.2f}"
        )
    return (
        f"{told}; standard deviation of a file's change expected {expected.expected_standard_deviation:g}, seen "
        f"{found.standard_deviation:.4f}"
    )


def surprises(judgement: Judgement) -> list[str]:
    """Guards whose answers spread wider than the spec expected: their power was less than planned."""
    told = []
    for result in judgement.suites:
        found = result.evidence.baseline.spread if result.evidence.baseline else None
        if result.evidence.role != "guard" or found is None:
            continue
        expected = result.expected
        if found.discordance is not None:
            seen = found.discordance * found.design_effect
            limit = expected.expected_discordance * expected.expected_design_effect
        else:
            seen, limit = found.standard_deviation or 0.0, expected.expected_standard_deviation
        if seen > limit:
            wider = f"the answers spread wider ({seen:.3g}) than the spec expects ({limit:g})"
            told.append(f"{result.evidence.suite}: {wider}")
    return told


def ruling_text(result: SuiteResult) -> str:
    """The ruling as a sentence."""
    return f"{outcome_of(result).capitalize()}: {result.ruling.reason.removeprefix('reported only: ')}."


def comparison_texts(result: SuiteResult) -> list[str]:
    """What is known against baseline and anchor, and whether it was expected; one line each."""
    evidence, told = result.evidence, []
    if evidence.baseline is not None:
        told.append(_against("baseline", evidence.baseline, evidence.measure, evidence.level))
    if evidence.anchor is not None and evidence.anchor == evidence.baseline:
        told.append("against the anchor: the same")
    elif evidence.anchor is not None:
        told.append(_against("anchor", evidence.anchor, evidence.measure, evidence.level))
    expected = expected_text(result)
    return told if expected is None else [*told, expected]


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


def most_changed(changed: Sequence[Change]) -> tuple[list[Change], list[Change]]:
    """The items that changed most, for the worse and for the better."""
    worse = [c for c in changed if c.gain < 0]
    better = sorted((c for c in changed if c.gain > 0), key=lambda c: (-c.gain, c.item))
    return worse[:ITEMS_SHOWN], better[:ITEMS_SHOWN]


def changes_text(changed: Sequence[Change]) -> str:
    """How many items changed which way."""
    better = sum(c.gain > 0 for c in changed)
    return f"{better} items got better, {len(changed) - better} worse. Those that changed most, the worst and the best:"


def background_rows(background: Background) -> list[tuple[str, list[list[str]]]]:
    """Tables of what is known beside the figures: (title, rows), the first row the head."""
    tables, known = [], background.provenance
    if background.contamination is not None:
        rows = [["suite", "items", "share a 13-gram with training text", "the most shared item"]]
        for name, found in background.contamination["suites"].items():
            most = found["listed"][0] if found["listed"] else None
            told = "-" if most is None else f"{most['item']} ({100 * most['fraction']:.0f} %): {most['passage']}"
            share = f"{found['num_shared']} ({100 * found['shared_fraction']:.1f} %)"
            rows.append([name, str(found["num_items"]), share if found["num_items"] else "not looked at", told])
        tables.append(("Contamination", rows))
    if known.get("sources"):
        total = sum(s["weight"] for s in known["sources"])
        rows = [["source", "share of tokens", "domain", "training text"]]
        rows += [
            [s["name"], f"{100 * s['weight'] / total:.0f} %", "yes" if s["is_domain"] else "no", s["train"]]
            for s in known["sources"]
        ]
        tables.append(("Data mixture", rows))
    if known.get("stages"):
        rows = [["stage", "recipe", "snapshot"], *[[s, r[:12], i[:12]] for s, r, i in known["stages"]]]
        base = known.get("base_version")
        tables.append(("Lineage" + ("" if base is None else f" (built on version {base})"), rows))
    return tables
