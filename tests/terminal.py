"""Commands run in a pseudoterminal, and what a person then sees of them."""

import contextlib
import errno
import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROWS = 50
FOR_COPYING = ("page:", "chart:", "next:", "report:", "private key:", "public key:")
"""Lines that stay whole, so that a path or a command can be copied."""
PART = re.compile(r"\x1b\[\??(?P<number>[0-9;]*)(?P<command>[A-Za-z])|\n|\r|\x1b|[^\x1b\r\n]+")


@dataclass(frozen=True, slots=True)
class Shown:
    """What a command wrote to its terminal."""

    status: int
    output: str
    columns: int

    def lines(self) -> list[str]:
        """The screen after the command's end, scrolled-off lines included; one longer than the screen stays whole."""
        return screen(self.output)

    def widest(self) -> int:
        return max(map(len, self.lines()), default=0)

    def overflowing(self) -> list[str]:
        """Lines that are too long although they could be folded."""
        return [
            line
            for line in self.lines()
            if len(line) > self.columns
            and not line.startswith(FOR_COPYING)
            and max(map(len, line.split())) <= self.columns - 4
        ]

    def json(self) -> Any:
        """The answer of a command with --json: the last line that is one."""
        return json.loads(next(line for line in reversed(self.lines()) if line.startswith(("{", "["))))


def run_in_terminal(
    command: Sequence[str],
    columns: int = 80,
    *,
    folder: Path | None = None,
    variables: Mapping[str, str] | None = None,
    timeout_seconds: float = 3600,
) -> Shown:
    """Run a command whose standard output and error are a terminal of so many columns."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
    settings = {"TERM": "xterm-256color", **_without(os.environ, "COLUMNS", "LINES", "NO_COLOR"), **(variables or {})}
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, reader)
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, cwd=folder, env=settings
            )
        finally:
            os.close(writer)
        stack.callback(process.wait)
        stack.callback(process.kill)
        output = _read(reader, process, time.monotonic() + timeout_seconds)
        return Shown(process.wait(), output, columns)


def screen(output: str) -> list[str]:
    """The lines that stand on an endless screen: line feeds, carriage returns, cursor up and down, erasures."""
    lines, row, column = [""], 0, 0
    for part in PART.finditer(output):
        text, number, command = part[0], part["number"], part["command"]
        if command == "A":
            row = max(row - int(number or 1), 0)
        elif command == "B":
            row += int(number or 1)
        elif command == "K":
            lines[row] = "" if number == "2" else lines[row][:column]
        elif text == "\n":
            row, column = row + 1, 0
        elif text == "\r":
            column = 0
        elif not text.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
        lines += [""] * (row + 1 - len(lines))
    return [line.rstrip() for line in lines]


def _read(reader: int, process: "subprocess.Popen[bytes]", deadline: float) -> str:
    """Until the command has ended and said everything, even where a program that it started has the terminal, too."""
    chunks = []
    while True:
        has_ended = process.poll() is not None
        if select.select([reader], [], [], 0.5)[0]:
            try:
                chunk = os.read(reader, 1 << 16)
            except OSError as error:
                if error.errno != errno.EIO:  # what Linux says when the other end is closed
                    raise
                break
            if not chunk:
                break
            chunks.append(chunk)
        elif has_ended:
            break
        assert time.monotonic() < deadline, f"the command did not end in time; it printed {b''.join(chunks[-20:])!r}"
    return b"".join(chunks).decode(errors="replace")


def _without(variables: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}
