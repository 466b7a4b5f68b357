"""What reports say, in words and rows: Markdown, HTML and chart share it. Pure."""

from typing import Any

from mansard.evaluation.comparison import Changes, Comparison, Estimate
from mansard.evaluation.gate import HIGHER_IS_BETTER
from mansard.evaluation.judgement import Background, Judgement, SuiteResult, outcome_of

ITEMS_LISTED = 10
"""Items of a suite that share most with training text; the stage's own snapshot lists more."""
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
    expected, plan = result.expected, result.plan
    if plan is None or expected is None or found is None:
        return None
    told = f"expected power at no change {plan.power:.2f} with {plan.size} {plan.unit}"
    if found.discordance is not None:
        return (
            f"{told}; discordance expected {expected.discordance:g}, seen {found.discordance:.3f}; design "
            f"effect expected {expected.design_effect:g}, seen {found.design_effect:.2f}"
        )
    return (
        f"{told}; standard deviation of a file's change expected {expected.standard_deviation:g}, seen "
        f"{found.standard_deviation:.4f}"
    )


def surprises(judgement: Judgement) -> list[str]:
    """Guards whose answers spread wider than the spec expected: their power was less than planned."""
    told = []
    for result in judgement.suites:
        found = result.evidence.baseline.spread if result.evidence.baseline else None
        expected = result.expected
        if result.plan is None or expected is None or found is None:
            continue
        if found.discordance is not None:
            seen = found.discordance * found.design_effect
            limit = expected.discordance * expected.design_effect
        else:
            seen, limit = found.standard_deviation or 0.0, expected.standard_deviation
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


def changes_text(changed: Changes) -> str:
    """How many items changed which way."""
    return f"{changed.num_better} items got better, {changed.num_worse} worse. Those that changed most:"


def background_rows(background: Background) -> list[tuple[str, list[list[str]]]]:
    """Tables of what is known beside the figures: (title, rows), the first row the head."""
    tables, known = [], background.provenance
    if background.contamination is not None:
        tables += _contamination_rows(background.contamination["suites"])
    if known.get("sources"):
        total = sum(s["weight"] for s in known["sources"])
        rows = [["source", "share of tokens", "domain", "training text"]]
        rows += [
            [s["name"], f"{100 * s['weight'] / total:.0f} %", "yes" if s["is_domain"] else "no", s["train"]]
            for s in known["sources"]
        ]
        tables.append(("Data mixture", rows))
    if known.get("importance"):
        tables.append(_importance_rows(known["importance"]))
    if known.get("fusion"):
        tables.append(_fusion_rows(known["fusion"]))
    if known.get("alphas"):
        tables.append(_alpha_rows(known["alphas"]))
    if known.get("stages"):
        rows = [["stage", "recipe", "snapshot"], *[[s, r[:12], i[:12]] for s, r, i in known["stages"]]]
        base = known.get("base_version")
        tables.append(("Lineage" + ("" if base is None else f" (built on version {base})"), rows))
    return tables


def _importance_rows(measured: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """What the loss on general text gains without each of the base's blocks, and which were copied."""
    rows = [["block of the base", "loss gained without it (nats a token)", "copied"]]
    rows += [[str(i), f"{g:+.4f}", "yes" if i in measured["copied"] else "no"] for i, g in enumerate(measured["gains"])]
    probe = measured["probe"]
    text = f"{probe['rows']} rows of {probe['tokens']} tokens of general text, loss {measured['loss']:.4f}"
    return f"Placement by importance ({text})", rows


def _fusion_rows(fusion: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """What an average keeps of its storey's gain, and that the base is not what it was."""
    rows = [["text (bits per byte, unquantized)", "base", "expanded", "averaged", "of the gain kept", "guard loss"]]
    for name, text in fusion["texts"].items():
        kept = text.get("kept_share")
        told = ["nothing was gained" if kept is None else f"{100 * kept:.0f} %", "-"]
        if "loss" in text:
            told = ["-", f"{text['loss']:+.4f}"]
        rows.append([name, *(f"{text[who]:.4f}" for who in ("base", "expanded", "averaged")), *told])
    changed = len(fusion["changed_base_tensors"])
    title = f"Fusion by average, the new blocks' weight {fusion['weight']:g}"
    return f"{title}: {changed} tensors of the base changed, so nothing of this model is frozen", rows


def _alpha_rows(branch: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """Held-out bits per byte of every source at every alpha of a branch; the change is against the base's."""
    points = sorted(branch["alphas"], key=lambda p: float(p["alpha"]))
    base = points[0]["bits_per_byte"]
    rows = [["alpha", *base]]
    for point in points:
        bits = [f"{value:.4f} ({value - base[name]:+.4f})" for name, value in point["bits_per_byte"].items()]
        rows.append([f"{point['alpha']:g}" + (" (the base)" if point["alpha"] == 0 else ""), *bits])
    title = f"Branch of {branch['parameters']:,} parameters ({branch['bytes'] / 1e6:.2f} MB), trained at alpha "
    return f"{title}{branch['trained_alpha']:g}: held-out bits per byte over alpha", rows


def _contamination_rows(suites: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    counts = [["suite", "items", "share a 13-gram with training text", "too short to tell"]]
    shared = [["suite", "item", "of its 13-grams", "found in", "passage"]]
    for name, found in suites.items():
        share = f"{found['num_shared']} ({100 * found['shared_fraction']:.1f} %)"
        told = [share, str(found.get("num_short", "-"))] if found["num_items"] else ["not looked at", "-"]
        counts.append([name, str(found["num_items"]), *told])
        for each in found.get("listed", [])[:ITEMS_LISTED]:
            sources = ", ".join(each["sources"])
            shared.append([name, each["item"], f"{100 * each['fraction']:.0f} %", sources, each["passage"]])
    tables = [("Contamination", counts)]
    return [*tables, ("Items that share most with training text", shared)] if len(shared) > 1 else tables
