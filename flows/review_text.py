"""What `mansard review` shows on a terminal: the report's words and figures, summary first, the next command last.

A screen that is narrower than WIDE shows fewer columns, by their importance; the page has them all.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from flows.screen import columns
from mansard.evaluation.comparison import Change, Changes
from mansard.evaluation.gate import HIGHER_IS_BETTER
from mansard.evaluation.judgement import Judgement, SuiteResult, outcome_of
from mansard.evaluation.verdict_file import judgement_of
from mansard.evaluation.wording import (
    attempts_text,
    background_rows,
    change_text,
    changes_text,
    comparison_texts,
    interval_text,
    ruling_text,
    surprises,
    value_text,
)
from mansard.records import Registration

WIDE = 120
"""Columns for everything; where no person looks, so many are used."""
BAR_CELLS = 21
SUMMARY = {
    "suite": 0, "role": 70, "n": WIDE, "before": WIDE, "after": WIDE, "change": 40, "interval": 60,
    "worse | better": WIDE, "says": 0,
}  # fmt: skip
"""Column -> the screen's width from which on it is shown."""
ITEM_CHARACTERS, ANSWER_CHARACTERS = 28, 26
STYLES = {"pass": "green", "fail": "red", "inconclusive": "yellow", "baseline": "blue", "reported": "dim"}


def show_on_standard_output(
    facts: Mapping[str, Any], verdict: Mapping[str, Any], registration: Registration
) -> None:
    """As wide as the terminal; `verdict` is verdict.json."""
    show(Console(width=columns() or WIDE), facts, judgement_of(verdict), registration)


def show(out: Console, facts: Mapping[str, Any], judgement: Judgement, registration: Registration) -> None:
    """Everything a reviewer needs to decide, in the order of the report."""
    _head(out, facts, judgement, registration)
    out.print(_summary(judgement.suites, out.width))
    for note in [*judgement.background.notes, *surprises(judgement)]:
        out.print(f"[yellow]note:[/yellow] {escape(note)}")
    out.print(escape(attempts_text(judgement)))
    for result in judgement.suites:
        _suite(out, result)
    if facts["cost"] is not None:
        out.print(_cost(facts["cost"]))
    for title, rows in background_rows(judgement.background):
        out.print(_table(title, rows))
    for decision in facts["decisions"]:
        told = f"{decision['kind']} by {decision['who']} at {decision['at']}: {decision['why']}"
        out.print(escape(told))
    out.print(f"page:   {facts['page']}\nchart:  {facts['chart']}", soft_wrap=True, highlight=False)
    is_command = facts["next"].startswith("mansard ")  # which stays whole, so that it can be copied
    out.print(f"next: {escape(facts['next'])}", soft_wrap=is_command, highlight=False)


def interval_bar(result: SuiteResult, cells: int = BAR_CELLS) -> str:
    """The change with its interval as characters, better to the right: `|` no change, `:` the margin."""
    effect = result.evidence.baseline.effect if result.evidence.baseline else None
    if effect is None or effect.low is None or effect.high is None:
        return ""
    sign = 1 if HIGHER_IS_BETTER[result.evidence.measure] else -1
    ends = sorted((sign * effect.low, sign * effect.high))
    margin = result.evidence.margin if result.evidence.role == "target" else -result.evidence.margin
    marks = {0.0: "|"} if result.evidence.role == "report" else {margin: ":", 0.0: "|"}
    low, high = min(ends[0], *marks), max(ends[1], *marks)

    def at(value: float) -> int:
        return round((value - low) / ((high - low) or 1.0) * (cells - 1))

    drawn = [" "] * cells
    for place in range(at(ends[0]), at(ends[1]) + 1):
        drawn[place] = "-"
    for value, mark in marks.items():
        drawn[at(value)] = mark
    drawn[at(sign * effect.value)] = "o"
    return "".join(drawn)


def _head(out: Console, facts: Mapping[str, Any], judgement: Judgement, registration: Registration) -> None:
    against = registration.baseline_version
    style = STYLES[judgement.verdict]
    out.print(
        f"[bold]{facts['model']} version {facts['version']}[/bold]: verdict [bold {style}]{judgement.verdict}"
        f"[/bold {style}], by {registration.author}, from version {registration.base_version}, judged against "
        f"{'nothing (first version)' if against is None else f'version {against}'}",
    )
    out.print(f"why: {escape(judgement.reason)}")


def _summary(suites: Sequence[SuiteResult], width: int) -> Table:
    table = Table(box=SIMPLE)
    shown = [name for name, from_width in SUMMARY.items() if width >= from_width]
    for name in shown:
        table.add_column(name, no_wrap=width >= WIDE)
    for result in suites:
        cells = _summary_cells(result)
        table.add_row(*(cells[name] for name in shown))
    return table


def _summary_cells(result: SuiteResult) -> dict[str, str]:
    evidence, measure = result.evidence, result.evidence.measure
    outcome, against = outcome_of(result), result.evidence.baseline
    return {
        "suite": evidence.suite,
        "role": evidence.role,
        "n": str(result.num_items),
        "before": value_text(against.before.value, measure) if against else "",
        "after": value_text(result.after.value, measure),
        "change": change_text(against.effect.value, measure) if against else "",
        "interval": interval_text(against.effect, measure) if against else "",
        "worse | better": escape(interval_bar(result)),
        "says": f"[{STYLES[outcome]}]{outcome}[/{STYLES[outcome]}]",
    }


def _suite(out: Console, result: SuiteResult) -> None:
    style = STYLES[outcome_of(result)]
    out.print(f"\n[bold]{escape(result.evidence.suite)}[/bold]  [{style}]{escape(ruling_text(result))}[/{style}]")
    for told in comparison_texts(result):
        out.print(Padding(escape(told), (0, 0, 0, 2)), highlight=False)
    if result.changes != Changes():
        out.print(Padding(changes_text(result.changes), (0, 0, 0, 2)))
        for which, changed in (("worse", result.changes.worst), ("better", result.changes.best)):
            if changed:
                out.print(_items(which, changed, out.width))


def _items(which: str, changed: Sequence[Change], width: int) -> Table:
    """A narrow screen has no room for the items' texts."""
    header = (f"for the {which}", "before", "after")
    room = max((width - 2 * len(header)) // len(header), 1)
    limits = [min(n, room) for n in (ITEM_CHARACTERS, ANSWER_CHARACTERS, ANSWER_CHARACTERS)]
    rows = [[_cut(t, n) for t, n in zip((c.item, c.before, c.after), limits, strict=True)] for c in changed]
    table = Table(box=None, padding=(0, 1))
    for name, limit, column in zip(header, limits, zip(*rows, strict=True), strict=True):
        table.add_column(name, no_wrap=True, min_width=min(max(map(len, (name, *column))), limit))
    if width >= WIDE:
        table.add_column("text", no_wrap=True, overflow="ellipsis")
    for row, each in zip(rows, changed, strict=True):
        table.add_row(*map(escape, row), *([escape(" ".join(each.text.split()))] if width >= WIDE else []))
    return table


def _cut(text: str, characters: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= characters else f"{line[: characters - 1]}…"


def _cost(cost: Mapping[str, Any]) -> Table:
    """Latency in milliseconds, memory in MB, measured side by side when the version was evaluated."""
    columns = [c for c in ("baseline", "candidate", "ratio") if c in cost]
    rows = [[key, *(f"{cost[c][key]:,.2f}" if key in cost[c] else "" for c in columns)] for key in cost["candidate"]]
    return _table(f"cost, {cost['prompts']} prompts, {cost['concurrency']} at once", [["figure", *columns], *rows])


def _table(title: str, rows: Sequence[Sequence[str]]) -> Table:
    """The first row is the head."""
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column)
    for row in rows[1:]:
        table.add_row(*map(escape, row))
    return table
