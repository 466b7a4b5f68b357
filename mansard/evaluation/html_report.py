"""report.html: the report as one page that needs nothing else: no script, no style sheet, no picture from elsewhere.

Every word from outside (items, answers, file names) is escaped. The same results give the same bytes.
"""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mansard.evaluation.gate import HIGHER_IS_BETTER
from mansard.evaluation.judgement import Judgement, SuiteResult, outcome_of
from mansard.evaluation.pairing import Change
from mansard.evaluation.wording import (
    COST_ELSEWHERE,
    attempts_text,
    background_rows,
    change_text,
    changes_text,
    comparison_texts,
    headline,
    most_changed,
    ruling_text,
    surprises,
    unit_of,
)

COLORS = {"pass": "#1a7f37", "fail": "#cf222e", "inconclusive": "#9a6700", "baseline": "#0969da"}
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#24292f;max-width:62rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.7rem}h2{font-size:1.25rem;margin-top:2.2rem;border-top:1px solid #d0d7de;padding-top:1rem}
table{border-collapse:collapse;font-size:.85rem;margin:.6rem 0;width:100%}
td,th{border-bottom:1px solid #d0d7de;padding:.3rem .6rem;text-align:left;vertical-align:top}
td{overflow-wrap:anywhere}.word{font-weight:700}.note{background:#fff8c5;padding:.5rem .8rem}img,svg{max-width:100%}
"""
WIDTH, HEIGHT, EDGE = 640, 84, 20


def render_html(judgement: Judgement, chart: bytes) -> str:
    """The page; `chart` is chart.png."""
    told = f"{judgement.reason[0].upper()}{judgement.reason[1:]}."
    notes = [*judgement.background.notes, *surprises(judgement)]
    picture = base64.b64encode(chart).decode()
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Verdict: {judgement.verdict}</title>',
        f"<style>{STYLE}</style></head><body>",
        f'<h1>Verdict: <span style="color:{_color(judgement.verdict)}">{judgement.verdict}</span></h1>',
        f"<p>{escape(told)}</p>",
        "<ul>" + "".join(f"<li>{_bold(headline(s))}</li>" for s in judgement.suites) + "</ul>",
        *[f'<p class="note">{escape(n)}</p>' for n in notes],
        f"<p>{escape(attempts_text(judgement))}</p>",
        f'<img alt="Each suite before and after, and the change" src="data:image/png;base64,{picture}">',
        *[_section(s) for s in judgement.suites],
        *_background(judgement),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def html_with_cost(page: str, cost: Mapping[str, Any]) -> str:
    """The same page with cost.json in its place."""
    columns = [c for c in ("baseline", "candidate", "ratio") if c in cost]
    rows = [[k, *(f"{cost[c][k]:,.2f}" if k in cost[c] else "-" for c in columns)] for k in cost["candidate"]]
    return page.replace(f"<p>{escape(COST_ELSEWHERE)}</p>", _table([["figure", *columns], *rows]))


def interval_svg(result: SuiteResult) -> str:
    """The change with its interval, no change and the margin as lines; better is to the right."""
    evidence = result.evidence
    if evidence.baseline is None or evidence.baseline.effect.low is None or evidence.baseline.effect.high is None:
        return ""
    effect, sign = evidence.baseline.effect, 1 if HIGHER_IS_BETTER[evidence.measure] else -1
    ends = sorted((sign * evidence.baseline.effect.low, sign * evidence.baseline.effect.high))
    bound = evidence.margin if evidence.role == "target" else -evidence.margin
    low, high = min(ends[0], bound, 0.0), max(ends[1], bound, 0.0)
    scale = (WIDTH - 2 * EDGE) / ((high - low) or 1.0)

    def at(value: float) -> str:
        return f"{EDGE + (value - low) * scale:.1f}"

    color = _color(outcome_of(result))
    marks = [f'<line x1="{at(0)}" x2="{at(0)}" y1="10" y2="50" stroke="#24292f"/>{_label(at(0), 66, "no change")}']
    if evidence.role != "report" and bound:
        dashed = f'<line x1="{at(bound)}" x2="{at(bound)}" y1="10" y2="50" stroke="#cf222e" stroke-dasharray="5 3"/>'
        marks.append(dashed + _label(at(bound), 80, f"margin {change_text(sign * bound, evidence.measure)}"))
    stroke = f'stroke="{color}" stroke-width="7" opacity=".45"'
    bar = f'<line x1="{at(ends[0])}" x2="{at(ends[1])}" y1="30" y2="30" {stroke}/>'
    dot = f'<circle cx="{at(sign * effect.value)}" cy="30" r="6" fill="{color}"/>'
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">{"".join(marks)}{bar}{dot}</svg>'


def _label(place: str, height: int, text: str) -> str:
    return f'<text x="{place}" y="{height}" font-size="11" text-anchor="middle" fill="#57606a">{escape(text)}</text>'


def _section(result: SuiteResult) -> str:
    better = "higher" if HIGHER_IS_BETTER[result.evidence.measure] else "lower"
    outcome = outcome_of(result)
    worse, improved = most_changed(result.changes)
    parts = [
        f"<h2>{escape(result.evidence.suite)}</h2>",
        f'<p><span class="word" style="color:{_color(outcome)}">{escape(ruling_text(result))}</span> '
        f"{unit_of(result.evidence.measure).capitalize()}, {better} is better.</p>",
        interval_svg(result),
        "<ul>" + "".join(f"<li>{escape(t)}</li>" for t in comparison_texts(result)) + "</ul>",
    ]
    if result.changes:
        parts.append(f"<p>{escape(changes_text(result.changes))}</p>")
        parts += [_changes("worse", worse), _changes("better", improved)]
    return "\n".join(parts)


def _changes(which: str, changed: Sequence[Change]) -> str:
    rows = [[c.item, c.before, c.after, c.text] for c in changed]
    return _table([[f"changed most for the {which}", "before", "after", "text"], *rows]) if rows else ""


def _background(judgement: Judgement) -> list[str]:
    parts = [f"<h2>Cost</h2><p>{escape(COST_ELSEWHERE)}</p>"]
    parts += [f"<h2>{escape(title)}</h2>{_table(rows)}" for title, rows in background_rows(judgement.background)]
    names = [r.evidence.suite for r in judgement.suites]
    who = [w for w, suites in judgement.inputs.items() if suites]
    rows = [[n, *(judgement.inputs[w].get(n, "-")[:12] for w in who)] for n in names]
    return [*parts, "<h2>Item records</h2>" + _table([["suite", *who], *rows])]


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = ["<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in body]
    return "<table><tr>" + "".join(f"<th>{escape(c)}</th>" for c in head) + "</tr>" + "".join(lines) + "</table>"


def _bold(text: str) -> str:
    """`**suite** ...` of the Markdown headline."""
    _, name, rest = text.split("**", 2)
    return f"<strong>{escape(name)}</strong>{escape(rest)}"


def _color(outcome: str) -> str:
    return COLORS.get(outcome, "#6e7781")
