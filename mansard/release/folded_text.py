"""Plain text and tables that fit a screen of so many columns. Pure; standard library only.

Guarantees: with `columns` None nothing is folded, because a program reads it; a word is never broken, so that commands,
digests and addresses can be copied, and a table without room for its longest words becomes a block a row.
"""

import textwrap
from collections.abc import Sequence

GAPS = (2, 1)
"""Spaces between a table's columns: first tried wide."""


def fold(text: str, columns: int | None) -> str:
    """Every line that is too long is continued below, further in than it began."""
    if columns is None:
        return text
    return "\n".join(_fold_line(line, columns) for line in text.split("\n"))


def table(header: Sequence[str], rows: Sequence[Sequence[object]], columns: int | None = None) -> str:
    """Columns padded to their widest cell, cells folded where the screen is narrower; None is a dash."""
    cells = [list(header), *([("-" if c is None else str(c)) for c in row] for row in rows)]
    widest = [max(_width(row[i]) for row in cells) for i in range(len(header))]
    longest_words = [max(len(w) for row in cells for w in (row[i].split() or [""])) for i in range(len(header))]
    for gap in GAPS:
        widths = _shrunk(widest, longest_words, None if columns is None else columns - gap * (len(header) - 1))
        if widths is not None:
            return "\n".join(line for row in cells for line in _lines(row, widths, gap))
    return "\n\n".join(_block(header, row, columns or 0) for row in cells[1:])


def _width(cell: str) -> int:
    return max(map(len, cell.split("\n")))


def _shrunk(widest: Sequence[int], longest_words: Sequence[int], room: int | None) -> list[int] | None:
    """Widths that fit, taken from the widest column first; None where the longest words do not."""
    widths = list(widest)
    while room is not None and sum(widths) > room:
        candidates = [i for i in range(len(widths)) if widths[i] > longest_words[i]]
        if not candidates:
            return None
        widths[max(candidates, key=lambda i: widths[i])] -= 1
    return widths


def _lines(row: Sequence[str], widths: Sequence[int], gap: int) -> list[str]:
    parts = [_wrapped(cell, width) for cell, width in zip(row, widths, strict=True)]
    lines = []
    for number in range(max(map(len, parts))):
        line = [part[number] if number < len(part) else "" for part in parts]
        lines.append((" " * gap).join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())
    return lines


def _wrapped(cell: str, width: int) -> list[str]:
    lines = []
    for line in cell.split("\n"):
        lines += [line] if len(line) <= width else _wrap(line, width)
    return lines


def _block(header: Sequence[str], row: Sequence[str], columns: int) -> str:
    lines = [f"{name}: {' '.join(cell.split())}" for name, cell in zip(header, row, strict=True)]
    return "\n".join(_fold_line(line, columns) for line in lines)


def _fold_line(line: str, columns: int) -> str:
    if len(line) <= columns:
        return line
    indent = line[: len(line) - len(line.lstrip())]
    return "\n".join(_wrap(line.strip(), columns, indent, indent + "  "))


def _wrap(line: str, columns: int, first: str = "", following: str = "") -> list[str]:
    return textwrap.wrap(
        line,
        columns,
        initial_indent=first,
        subsequent_indent=following,
        break_long_words=False,
        break_on_hyphens=False,
    )
