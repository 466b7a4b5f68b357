"""Text for a person on standard output, which fits the terminal that it may be. Standard library only."""

import sys

from mansard.release.folded_text import fold
from tasks import standard_streams


def columns() -> int | None:
    """The width of standard output; None where it is no terminal."""
    return standard_streams.columns(sys.stdout)


def show(text: str) -> None:
    """Lines for a person; one that a terminal has no room for is continued below."""
    print(fold(text, columns()))
