"""report.html: the report as one page that needs nothing else: no script, no style sheet, no picture from elsewhere.

It follows the reader's dark or light setting. Every word from outside (items, answers, file names) is escaped. The same
results give the same bytes.
"""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mansard.evaluation.comparison import Change, Changes
from mansard.evaluation.gate import HIGHER_IS_BETTER
from mansard.evaluation.interval_svg import interval_svg
from mansard.evaluation.judgement import Judgement, SuiteResult, outcome_of
from mansard.evaluation.wording import (
    COST_ELSEWHERE,
    amount_text,
    attempts_text,
    background_rows,
    change_text,
    changes_text,
    comparison_texts,
    interval_text,
    level_text,
    ruling_text,
    surprises,
    unit_of,
    value_text,
)

STYLE = """
:root{color-scheme:light dark;--ink:#1f2328;--soft:#59636e;--line:#d1d9e0;--page:#fff;--card:#f6f8fa;--note:#fff8c5;
--pass:#1a7f37;--fail:#cf222e;--inconclusive:#9a6700;--baseline:#0969da;--reported:#6e7781}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9198a1;--line:#3d444d;--page:#0d1117;--card:#161b22;
--note:#3b2e00;--pass:#3fb950;--fail:#f85149;--inconclusive:#d29922;--baseline:#58a6ff;--reported:#8b949e}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:70rem;margin:0 auto;
padding:1.5rem 1rem 4rem}
h1{font-size:1.7rem;margin:.2rem 0}h2{font-size:1.25rem;margin:2.4rem 0 .4rem;padding-top:1rem;
border-top:1px solid var(--line)}h3{font-size:.95rem;margin:1.2rem 0 .2rem}
table{border-collapse:collapse;font-size:.85rem;margin:.6rem 0;width:100%}
td,th{border-bottom:1px solid var(--line);padding:.35rem .6rem;text-align:left;vertical-align:top}
th{color:var(--soft);font-weight:600}td{overflow-wrap:anywhere}.summary td{vertical-align:middle}
td.number,.summary .word{white-space:nowrap;font-variant-numeric:tabular-nums}
.mono{font-family:ui-monospace,monospace;font-size:.8rem;white-space:pre-wrap}
.word{font-weight:700}.soft{color:var(--soft)}.note{background:var(--note);padding:.5rem .8rem;border-radius:6px}
.pass{color:var(--pass)}.fail{color:var(--fail)}.inconclusive{color:var(--inconclusive)}
.baseline{color:var(--baseline)}.reported{color:var(--reported)}
figure{margin:1rem 0;background:#fff;border:1px solid var(--line);border-radius:6px;padding:.5rem}img{max-width:100%}
svg{max-width:100%;height:auto;display:block}svg text{font-size:11px;fill:var(--soft)}
"""


def render_html(judgement: Judgement, chart: bytes) -> str:
    """The page; `chart` is chart.png."""
    told = f"{judgement.reason[0].upper()}{judgement.reason[1:]}."
    notes = [*judgement.background.notes, *surprises(judgement)]
    picture = base64.b64encode(chart).decode()
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Verdict: {judgement.verdict}</title>',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<style>{STYLE}</style></head><body>",
        f"<h1>Verdict: {_worded(judgement.verdict, judgement.verdict)}</h1>",
        f"<p>{escape(told)}</p>",
        _summary(judgement.suites),
        *[f'<p class="note">{escape(n)}</p>' for n in notes],
        f'<p class="soft">{escape(attempts_text(judgement))}</p>',
        '<figure><img alt="Each suite before and after, and the change with its interval" '
        f'src="data:image/png;base64,{picture}"></figure>',
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


def _summary(suites: Sequence[SuiteResult]) -> str:
    """A row a suite, with its interval as a small picture."""
    heads = ("suite", "role", "items (files)", "before", "after", "change", "interval", "better to the right", "margin")
    lines = "".join(f"<tr>{''.join(_summary_cells(result))}</tr>" for result in suites)
    names = "".join(f"<th>{head}</th>" for head in (*heads, "verdict"))
    return f'<table class="summary"><tr>{names}</tr>{lines}</table>'


def _summary_cells(result: SuiteResult) -> list[str]:
    evidence, measure, against = result.evidence, result.evidence.measure, result.evidence.baseline
    outcome = outcome_of(result)
    interval = f"{interval_text(against.effect, measure)} ({level_text(evidence.level)})" if against else "-"
    numbers = [
        f"{result.num_items} ({result.num_clusters})",
        value_text(against.before.value, measure) if against else "-",
        value_text(result.after.value, measure),
        change_text(against.effect.value, measure) if against else "-",
        interval,
    ]
    margin = amount_text(evidence.margin, measure) if evidence.role != "report" else "-"
    return [
        f"<td><strong>{escape(evidence.suite)}</strong><br>"
        f'<span class="soft">{unit_of(measure)}, {_better(measure)} is better</span></td>',
        f'<td class="number">{evidence.role}</td>',
        *[f'<td class="number">{escape(n)}</td>' for n in numbers],
        f"<td>{interval_svg(result, width=170, has_labels=False)}</td>",
        f'<td class="number">{margin}</td>',
        f"<td>{_worded(outcome, outcome)}</td>",
    ]


def _section(result: SuiteResult) -> str:
    parts = [
        f"<h2>{escape(result.evidence.suite)}</h2>",
        f"<p>{_worded(outcome_of(result), ruling_text(result))}</p>",
        interval_svg(result, width=640, has_labels=True),
        "<ul>" + "".join(f"<li>{escape(t)}</li>" for t in comparison_texts(result)) + "</ul>",
    ]
    if result.changes != Changes():
        parts.append(f"<p>{escape(changes_text(result.changes))}</p>")
        parts += [_changed("worse", result.changes.worst), _changed("better", result.changes.best)]
    return "\n".join(parts)


def _changed(which: str, changed: Sequence[Change]) -> str:
    if not changed:
        return ""
    rows = [[c.item, c.before, c.after, c.text] for c in changed]
    return f"<h3>For the {which}</h3>" + _table([["item", "before", "after", "text"], *rows], 'class="mono"')


def _background(judgement: Judgement) -> list[str]:
    parts = [f"<h2>Cost</h2><p>{escape(COST_ELSEWHERE)}</p>"]
    parts += [f"<h2>{escape(title)}</h2>{_table(rows)}" for title, rows in background_rows(judgement.background)]
    names = [r.evidence.suite for r in judgement.suites]
    who = [w for w, suites in judgement.inputs.items() if suites]
    rows = [[n, *(judgement.inputs[w].get(n, "-")[:12] for w in who)] for n in names]
    return [*parts, "<h2>Item records</h2>" + _table([["suite", *who], *rows])]


def _table(rows: Sequence[Sequence[str]], cells: str = "") -> str:
    """The first row is the head; `cells` are attributes of every other cell."""
    head, *body = rows
    opening = f"<td {cells}>" if cells else "<td>"
    lines = ["<tr>" + "".join(f"{opening}{escape(c)}</td>" for c in row) + "</tr>" for row in body]
    return "<table><tr>" + "".join(f"<th>{escape(c)}</th>" for c in head) + "</tr>" + "".join(lines) + "</table>"


def _worded(outcome: str, text: str) -> str:
    return f'<span class="word {outcome}">{escape(text)}</span>'


def _better(measure: str) -> str:
    return "higher" if HIGHER_IS_BETTER[measure] else "lower"
