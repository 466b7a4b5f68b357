"""Standard output as a person's screen: how wide it is, and text that fits it. Standard library only."""

import os
import sys

from mansard.release.folded_text import fold

USUAL_COLUMNS = 80
"""Of a terminal that does not say."""


def columns() -> int | None:
    """The width of the terminal that standard output is; None where it is none (a pipe, a file): nothing is folded."""
    try:
        if not sys.stdout.isatty():
            return None
        return os.get_terminal_size(sys.stdout.fileno()).columns or USUAL_COLUMNS
    except (OSError, ValueError):  # it hung up, or is no file
        return None


def show(text: str) -> None:
    """Lines for a person; one that a terminal has no room for is continued below."""
    print(fold(text, columns()))
