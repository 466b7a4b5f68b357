"""Standard output and error of a command, whatever they are: a pipe whose reader went away, a closed descriptor, a
terminal that hung up, a full disk.

Guarantees: a descriptor that is closed becomes /dev/null, so that no file of ours gets its number; what nobody reads is
dropped, and the command goes on to its own exit status (`mansard history | head -1` is 0, no line is an error); only
standard output that a full disk does not take is a MansardError. Standard library only.
"""

import errno
import io
import os
import select
import stat
import sys
from typing import TYPE_CHECKING, TextIO

from mansard.errors import MansardError
from mansard.release.folded_text import fold

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

USUAL_COLUMNS = 80
"""Of a terminal that does not say."""
NO_READER = (errno.EPIPE, errno.ECONNRESET, errno.EBADF)


def prepare() -> None:
    """Do this first in a command's process. Streams that somebody put in place of the process's own stay."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            os.set_inheritable(opened, True)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _replacement(sys.__stdout__, 1, must_arrive=True)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _replacement(sys.__stderr__, 2, must_arrive=False)


def writer(number: int, must_arrive: bool = False, encoding: str = "utf-8", has_lines: bool = True) -> TextIO:
    """Text to a descriptor, which stays open. With `must_arrive`, an error of a disk is raised."""
    raw = _Descriptor(number, must_arrive)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=encoding, errors="backslashreplace", line_buffering=has_lines
    )


def say(line: str) -> None:
    """One line for a person, on standard error, folded to a terminal's width; where nobody can read it, nothing."""
    stream = sys.stderr
    if stream is None:  # the process began without one; print would take standard output instead
        return
    try:
        print(fold(line, columns(stream)), file=stream, flush=True)
    except (OSError, ValueError):  # no reader, a full disk; a stream that was closed
        return


def columns(stream: TextIO) -> int | None:
    """The width of the terminal that a stream is; None where it is none (a pipe, a file): nothing is folded there."""
    try:
        return (os.get_terminal_size(stream.fileno()).columns or USUAL_COLUMNS) if stream.isatty() else None
    except (OSError, ValueError):  # it hung up, is closed, or is no file
        return None


def _replacement(stream: TextIO | None, number: int, must_arrive: bool) -> TextIO:
    if stream is None:
        return writer(number, must_arrive)
    has_lines = number == 2 or os.isatty(number)
    return writer(number, must_arrive, stream.encoding, has_lines)


class _Descriptor(io.FileIO):
    """Writes that fail for want of a reader are taken for written."""

    def __init__(self, number: int, must_arrive: bool) -> None:
        super().__init__(number, "wb", closefd=False)
        self._must_arrive = must_arrive
        self._is_lost = False

    def write(self, data: "ReadableBuffer") -> int:
        size = memoryview(data).nbytes
        while not self._is_lost:
            try:
                written: int | None = super().write(data)
            except OSError as error:
                self._is_lost = True
                if self._must_arrive and not self._has_no_reader(error):
                    raise MansardError(
                        f"standard output: cannot be written ({error.strerror}); the command's work is complete, its "
                        "answer is cut short: make room and ask again"
                    ) from error
                break
            if written is not None:
                return written
            select.select([], [self], [])  # another program made the terminal non-blocking
        return size

    def _has_no_reader(self, error: OSError) -> bool:
        if error.errno == errno.EIO:  # a terminal that hung up; of a file it is a broken disk
            return stat.S_ISCHR(os.fstat(self.fileno()).st_mode)
        return error.errno in NO_READER
