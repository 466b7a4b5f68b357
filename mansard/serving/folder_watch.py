"""Says at once when something in a folder was replaced or written: Linux inotify, through the C library.

Guarantees: after a rename into the folder, or the close of a file written there, the descriptor becomes readable.
Not covered: which file it was (readers look at their own), and file systems that tell nobody (network mounts): readers
also look now and then on their own account.

Measured 2026-11 on 2 shared cores: polling each 20 ms took 0.9 % of a core and a new split was seen 10 ms late in the
mean; this takes nothing while idle.
"""

import contextlib
import ctypes
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from mansard.errors import MansardError

_IN_CLOSE_WRITE, _IN_MOVED_TO = 0x8, 0x80
_READ_BYTES = 64 * 1024


class FolderWatch:
    """A context manager around one inotify descriptor, for an event loop's `add_reader`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor = -1

    def __enter__(self) -> Self:
        library = ctypes.CDLL(None, use_errno=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._descriptor = library.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        mask = ctypes.c_uint32(_IN_CLOSE_WRITE | _IN_MOVED_TO)
        if self._descriptor < 0 or library.inotify_add_watch(self._descriptor, os.fsencode(self.folder), mask) < 0:
            reason = os.strerror(ctypes.get_errno())
            self.close()
            raise MansardError(f"{self.folder}: cannot be watched: {reason}; raise fs.inotify.max_user_watches")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def fileno(self) -> int:
        return self._descriptor

    def clear(self) -> None:
        """Forget what happened so far; the descriptor is no longer readable."""
        with contextlib.suppress(BlockingIOError):  # there is nothing more
            while os.read(self._descriptor, _READ_BYTES):
                pass

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
