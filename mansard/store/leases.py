"""Leases: work under way says since when nothing that it used may go. A lease ends with its process, however it ends.

Take one while the store's lock is held shared, and sweep while it is held exclusively: then no new lease is mistaken
for one whose process died. Leases are files of this machine: work on another host is protected by the grace period.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path


class Leases:
    """Files below `folder`, each locked by its holder; a file's modification time is the lease's beginning."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def take(self, reach_seconds: float) -> tuple[int, Path]:
        """(descriptor that holds it, its file); it begins `reach_seconds` ago."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{os.getpid()}.{os.urandom(4).hex()}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        begun = time.time() - reach_seconds
        os.utime(path, (begun, begun))
        return descriptor, path

    def give_back(self, descriptor: int, path: Path) -> None:
        path.unlink(missing_ok=True)
        os.close(descriptor)

    def begun(self) -> list[float]:
        """When each lease that is held began."""
        return [begun for begun, is_held, _ in self._all() if is_held]

    def sweep(self) -> None:
        """Remove what processes that died left."""
        for _, is_held, path in self._all():
            if not is_held:
                path.unlink(missing_ok=True)

    def _all(self) -> Iterator[tuple[float, bool, Path]]:
        if not self._folder.is_dir():
            return
        for path in sorted(self._folder.iterdir()):
            with contextlib.suppress(FileNotFoundError):  # given back since it was listed
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    yield os.fstat(descriptor).st_mtime, _is_held(descriptor), path
                finally:
                    os.close(descriptor)


def _is_held(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
