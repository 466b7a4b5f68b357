"""The report of a verdict: Markdown, summary first. Pure; the same results give the same bytes."""

from collections.abc import Mapping, Sequence
from typing import Any

from mansard.evaluation.comparison import Change, Changes
from mansard.evaluation.gate import HIGHER_IS_BETTER
from mansard.evaluation.judgement import Background, Judgement, SuiteResult, outcome_of
from mansard.evaluation.wording import (
    COST_ELSEWHERE,
    amount_text,
    attempts_text,
    background_rows,
    change_text,
    changes_text,
    comparison_texts,
    headline,
    interval_text,
    level_text,
    ruling_text,
    surprises,
    unit_of,
    value_text,
)


def render(judgement: Judgement) -> str:
    """report.md; it shows chart.png, which lies beside it."""
    parts = [
        f"# Verdict: {judgement.verdict}\n",
        f"{judgement.reason[0].upper()}{judgement.reason[1:]}.\n",
        *[f"- {headline(s)}" for s in judgement.suites],
        "",
        *[f"Note: {note}\n" for note in [*judgement.background.notes, *surprises(judgement)]],
        "![Before and after, and the change with its interval](chart.png)\n",
        _table(judgement),
        attempts_text(judgement) + "\n",
        *[_section(s) for s in judgement.suites],
        *_background(judgement.background),
        _inputs(judgement),
    ]
    return "\n".join(parts).rstrip() + "\n"


def with_cost(report: str, cost: Mapping[str, Any]) -> str:
    """The same report with cost.json in its place."""
    return report.replace(f"{COST_ELSEWHERE}\n", cost_table(cost))


def cost_table(cost: Mapping[str, Any]) -> str:
    """cost.json as a Markdown table."""
    columns = [c for c in ("baseline", "candidate", "ratio") if c in cost]
    lines = [f"| figure | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for key in cost["candidate"]:
        cells = [f"{cost[c][key]:,.2f}" if key in cost[c] else "-" for c in columns]
        lines.append(f"| {key} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _table(judgement: Judgement) -> str:
    lines = [
        "| suite | role | items (files) | before | after | change | interval | margin | verdict |",
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
            f"{interval_text(b.effect, measure)} ({level_text(evidence.level)})" if b else "-",
            amount_text(evidence.margin, measure) if evidence.role != "report" else "-",
            outcome_of(result),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _section(result: SuiteResult) -> str:
    evidence, measure = result.evidence, result.evidence.measure
    better = "higher" if HIGHER_IS_BETTER[measure] else "lower"
    lines = [f"## {evidence.suite}\n", f"{unit_of(measure).capitalize()}, {better} is better. {ruling_text(result)}\n"]
    if measure == "accuracy" and evidence.chance:
        lines.append(f"A blind guess is right in {100 * evidence.chance:.1f} %.\n")
    lines += [f"- {told}" for told in comparison_texts(result)]
    if result.changes != Changes():
        lines += ["", f"{changes_text(result.changes)}\n"]
        lines += [*_changed("worse", result.changes.worst), *_changed("better", result.changes.best)]
    return "\n".join(lines) + "\n"


def _changed(which: str, changed: Sequence[Change]) -> list[str]:
    if not changed:
        return []
    lines = [f"| changed most for the {which} | before | after | text |", "|---|---|---|---|"]
    rows = [(change.item, change.before, change.after, change.text) for change in changed]
    return [*lines, *(f"| {' | '.join(_cell(c) for c in cells)} |" for cells in rows), ""]


def _background(background: Background) -> list[str]:
    """Cost (see COST_ELSEWHERE), contamination, mixture and lineage, as far as they are known."""
    parts = [f"## Cost\n\n{COST_ELSEWHERE}\n"]
    for title, rows in background_rows(background):
        head, *body = rows
        lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines += [f"| {' | '.join(_cell(c) for c in row)} |" for row in body]
        parts.append(f"## {title}\n\n" + "\n".join(lines) + "\n")
    return parts


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def _inputs(judgement: Judgement) -> str:
    who = [w for w, suites in judgement.inputs.items() if suites]
    lines = ["## Item records\n", f"| suite | {' | '.join(who)} |", "|---" * (len(who) + 1) + "|"]
    for result in judgement.suites:
        name = result.evidence.suite
        cells = [f"`{judgement.inputs[w][name][:12]}`" if name in judgement.inputs[w] else "-" for w in who]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
