"""Room for a rollback on a full disk: a file that is given up when there is no other way. Standard library only."""

import errno
import os
from collections.abc import Callable
from typing import TypeVar

from mansard.errors import MansardError
from mansard.site import Site

BALLAST_BYTES = 8 << 20
"""Entry, split and memory file take some KB; SQLite's log and a journal page cache the rest."""

T = TypeVar("T")


def keep_ballast(site: Site) -> None:
    """Take the room while there is some; nothing where it cannot be had now."""
    path = site.ballast_file
    if path.exists() and path.stat().st_size == BALLAST_BYTES:
        return
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, BALLAST_BYTES)
    except OSError as error:
        path.unlink(missing_ok=True)
        if error.errno != errno.ENOSPC:
            raise
    finally:
        os.close(descriptor)


def with_room(site: Site, act: Callable[[], T]) -> T:
    """`act`, once more with the ballast thrown off where the disk was full. It must be safe to repeat."""
    try:
        return act()
    except (MansardError, OSError):
        if not _is_full(site) or not site.ballast_file.exists():
            raise
        site.ballast_file.unlink()
        return act()


def _is_full(site: Site) -> bool:
    room = os.statvfs(site.home)
    return room.f_bavail * room.f_frsize < BALLAST_BYTES
