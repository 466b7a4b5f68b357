"""The change of one suite with its interval, as inline SVG whose colours are the page's. Better is to the right."""

from html import escape

from mansard.evaluation.gate import HIGHER_IS_BETTER
from mansard.evaluation.judgement import SuiteResult, outcome_of
from mansard.evaluation.wording import change_text

EDGE = 48
"""Room for half a label at either end."""


def interval_svg(result: SuiteResult, width: int, has_labels: bool) -> str:
    """Lines at no change and at the margin, the wrong side of the margin shaded; empty where nothing is known."""
    evidence = result.evidence
    effect = evidence.baseline.effect if evidence.baseline else None
    if effect is None or effect.low is None or effect.high is None:
        return ""
    sign = 1 if HIGHER_IS_BETTER[evidence.measure] else -1
    ends = sorted((sign * effect.low, sign * effect.high))
    bound = evidence.margin if evidence.role == "target" else -evidence.margin
    bounds = [] if evidence.role == "report" else [bound]
    low, high = min(ends[0], 0.0, *bounds), max(ends[1], 0.0, *bounds)
    edge = EDGE if has_labels else 8
    scale = (width - 2 * edge) / ((high - low) or 1.0)

    def at(value: float) -> str:
        return f"{edge + (value - low) * scale:.1f}"

    top, middle, bottom = (6, 28, 50) if has_labels else (2, 11, 20)
    height = 84 if has_labels else 22
    marks = []
    for each in bounds:
        marks.append(
            f'<rect x="0" y="{top}" width="{at(each)}" height="{bottom - top}" style="fill:var(--fail)" opacity=".1"/>'
            f'<line x1="{at(each)}" x2="{at(each)}" y1="{top}" y2="{bottom}" style="stroke:var(--fail)" '
            'stroke-dasharray="5 3"/>'
        )
        if has_labels and each:
            marks.append(_label(at(each), 80, f"margin {change_text(sign * each, evidence.measure)}"))
    marks.append(f'<line x1="{at(0)}" x2="{at(0)}" y1="{top}" y2="{bottom}" style="stroke:var(--ink)"/>')
    color = f"var(--{outcome_of(result)})"
    marks.append(
        f'<line x1="{at(ends[0])}" x2="{at(ends[1])}" y1="{middle}" y2="{middle}" style="stroke:{color}" '
        f'stroke-width="{7 if has_labels else 5}" stroke-linecap="round" opacity=".5"/>'
        f'<circle cx="{at(sign * effect.value)}" cy="{middle}" r="{6 if has_labels else 4}" style="fill:{color}"/>'
    )
    if has_labels:
        marks.append(_label(at(0), 66, "no change"))
    told = f"change {change_text(effect.value, evidence.measure)}"
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{escape(told)}">'
        f"{''.join(marks)}</svg>"
    )


def _label(place: str, height: int, text: str) -> str:
    return f'<text x="{place}" y="{height}" text-anchor="middle">{escape(text)}</text>'
