"""Progress where a person looks: bars on a terminal, a line per tenth of the way elsewhere. Always standard error.

Guarantees: nothing that a stage reports and nothing that becomes of standard error ends the stage.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from mansard.launch import Progress
from tasks.progress_reading import Reading, reading
from tasks.standard_streams import say

__all__ = ["say", "stage_progress"]

TERMINALS_WITHOUT_CURSOR = ("dumb", "unknown")


@contextlib.contextmanager
def stage_progress(has_bar: bool = True) -> Iterator[Progress]:
    """A progress callback for `mansard.launch.derive`, for as long as the block lasts.

    A terminal shows one set of bars at a time: a second stage beside the first passes `has_bar=False`.
    """
    if has_bar and _can_show_bars():
        from tasks.progress_bars import shown_bars  # rich: only where there is a terminal

        with shown_bars() as bars:
            yield bars.report
    else:
        yield _Lines().report


def _can_show_bars() -> bool:
    try:
        is_terminal = sys.stderr is not None and sys.stderr.isatty() and os.isatty(sys.stderr.fileno())
    except (OSError, ValueError):  # closed, or no file at all
        return False
    return is_terminal and os.environ.get("TERM") not in TERMINALS_WITHOUT_CURSOR


class _Lines:
    """A line when another tenth is done; without a total, when the count has doubled."""

    def __init__(self) -> None:
        self._reached: dict[str, int] = {}

    def report(self, stage: str, progress: dict[str, Any]) -> None:
        now = reading(progress)
        reached = _milestone(now)
        if reached > self._reached.get(stage, -1):
            self._reached[stage] = reached
            say(f"{stage}: {now.count()} {now.text}".rstrip())


def _milestone(now: Reading) -> int:
    return int(now.completed).bit_length() if now.total is None else int(now.percent / 10)
