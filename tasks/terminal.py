"""Progress where a person looks: bars on a terminal, a line per tenth of the way elsewhere. Always standard error."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mansard.launch import Progress as Report

MAX_BAR_TEXT = 40
"""What a stage says in more characters is a line of its own, above its bar."""


@contextlib.contextmanager
def stage_progress(has_bar: bool = True) -> Iterator[Report]:
    """A progress callback for `mansard.launch.derive`, for as long as the block lasts.

    A terminal shows one set of bars at a time: a second stage beside the first passes `has_bar=False`.
    """
    if has_bar and sys.stderr.isatty():
        with _bars() as bars:
            yield _Bars(bars).report
    else:
        yield _Lines().report


def say(line: str) -> None:
    """One line for a person."""
    print(line, file=sys.stderr, flush=True)


def _bars() -> Progress:
    return Progress(
        TextColumn("{task.description:12}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
        console=Console(stderr=True),
    )


class _Bars:
    """One bar a stage."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._rows: dict[str, TaskID] = {}
        self._said: set[str] = set()

    def report(self, stage: str, progress: dict[str, Any]) -> None:
        if stage not in self._rows:
            self._rows[stage] = self._bars.add_task(stage, total=None, unit="", text="")
        text = str(progress.get("text", ""))
        if len(text) > MAX_BAR_TEXT:
            if text not in self._said:
                self._said.add(text)
                self._bars.console.print(f"{stage}: {text}", highlight=False, markup=False)
            text = ""
        self._bars.update(
            self._rows[stage], total=progress["total"], completed=progress["done"], unit=progress["unit"], text=text
        )


class _Lines:
    """A line when another tenth is done."""

    def __init__(self) -> None:
        self._told: dict[str, int] = {}

    def report(self, stage: str, progress: dict[str, Any]) -> None:
        total = progress["total"] or 1
        tenth = int(10 * progress["done"] / total)
        if tenth > self._told.get(stage, -1):
            self._told[stage] = tenth
            text = f" {progress['text']}" if progress.get("text") else ""
            say(f"{stage}: {progress['done']:,.0f}/{total:,.0f} {progress['unit']}{text}")
