"""Bars on a terminal: one line a stage, never wider than the terminal, which moves also while no total is known.

A narrow terminal shows a percentage instead of counts, then fewer things; colour as the terminal and NO_COLOR have it.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment

from tasks.progress_reading import Reading, reading
from tasks.standard_streams import writer

MAX_BAR_TEXT = 40
"""What a stage says in more characters is a line of its own, above its bar."""
MIN_COLUMNS_FOR_COUNTS = 60
MIN_BAR, MAX_BAR = 8, 40
MIN_TEXT = 8
NAME_CELLS = 12
REFRESHES_PER_SECOND = 10.0


@contextlib.contextmanager
def shown_bars(clock: Callable[[], float] = time.monotonic) -> Iterator["Bars"]:
    """Bars below the lines that are printed meanwhile, for as long as the block lasts; they stay as they were then."""
    console = Console(file=writer(2), force_terminal=True)
    bars = Bars(console, clock)
    with Live(bars, console=console, refresh_per_second=REFRESHES_PER_SECOND):
        yield bars
        bars.finish()


@dataclass(frozen=True, slots=True)
class Row:
    """A stage's last report. It counted from `first_completed` at `first_at`: what a checkpoint kept took no time."""

    stage: str
    now: Reading
    started_at: float
    first_at: float
    first_completed: float
    ended_at: float | None = None

    def remaining_seconds(self, at: float) -> float | None:
        """Until the end, at the pace so far; None where that is not known, or no number."""
        gain = self.now.completed - self.first_completed
        if self.now.total is None or gain <= 0 or self.now.completed >= self.now.total:
            return None
        seconds = (at - self.first_at) * ((self.now.total - self.now.completed) / gain)
        return seconds if math.isfinite(seconds) else None


@dataclass(frozen=True, slots=True)
class Line:
    """What stands before and after a bar of `bar` cells (0: no bar)."""

    before: str
    bar: int
    after: str


class Bars:
    """One line a stage, in the order of their first reports."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._console = console
        self._clock = clock
        self._rows: dict[str, Row] = {}
        self._printed: set[str] = set()

    def report(self, stage: str, progress: dict[str, Any]) -> None:
        now, at = reading(progress), self._clock()
        if len(now.text) > MAX_BAR_TEXT:
            if now.text not in self._printed:
                self._printed.add(now.text)
                self._console.print(f"{stage}: {now.text}", highlight=False, markup=False)
            now = replace(now, text="")
        row = self._rows.get(stage, Row(stage, now, at, at, now.completed))
        if row.now.total is None:
            row = replace(row, first_at=at, first_completed=now.completed)
        self._rows[stage] = replace(row, now=now)

    def finish(self) -> None:
        """The work of every row is complete, also of those that never had a total."""
        at = self._clock()
        self._rows = {stage: replace(row, ended_at=at) for stage, row in self._rows.items()}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        at = self._clock()
        for row in tuple(self._rows.values()):  # another thread draws
            line = line_of(row, at, options.max_width)
            yield Segment(line.before)
            yield from _bar(row, line.bar, at, console, options)
            yield Segment(line.after)
            yield Segment.line()


def line_of(row: Row, at: float, columns: int) -> Line:
    """The parts of a row that fit: name and count, then bar, time so far, time to go, text."""
    now, has_ended = row.now, row.ended_at is not None
    name = _fitted(row.stage, max(min(NAME_CELLS, columns // 2), cell_len(row.stage) if columns >= 60 else 0))
    count = f"{now.percent:.0f} %" if now.total is not None and columns < MIN_COLUMNS_FOR_COUNTS else now.count()
    if now.total is None and not now.completed:
        count = ""
    before = _fitted(name, min(cell_len(name), columns))
    room = columns - cell_len(before)
    after = ""
    for part in (
        count,
        "" if room < MIN_BAR else _duration((row.ended_at or at) - row.started_at),
        _to_go(None if has_ended else row.remaining_seconds(at)),
        now.text,
    ):
        free = room - cell_len(after) - (1 + MIN_BAR if room > 2 * MIN_BAR else 0) - 1
        if not part or free < min(cell_len(part), MIN_TEXT if part is now.text else cell_len(part)):
            continue
        after += " " + (part if cell_len(part) <= free else set_cell_size(part, free - 1).rstrip() + "…")
    bar = min(room - cell_len(after) - 1, MAX_BAR)
    return Line(before + " ", bar, after) if bar >= MIN_BAR else Line(before, 0, after)


def _bar(row: Row, cells: int, at: float, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
    if not cells:
        return
    is_full = row.now.total is None and row.ended_at is not None
    completed, total = (1.0, 1.0) if is_full else (row.now.completed, row.now.total)
    bar = ProgressBar(total, completed, cells, animation_time=at)
    drawn = [s for s in console.render(bar, options.update(width=cells)) if not s.control]
    yield from Segment.adjust_line_length(drawn, cells)


def _fitted(text: str, cells: int) -> str:
    return set_cell_size(text, cells)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _to_go(seconds: float | None) -> str:
    return "" if seconds is None else f"{_duration(seconds)} to go"
