"""Advisory locks on files (flock): they end with the process that holds them, however it ends.

Lock files stay where they are; removing one would let two holders hold different files of one name.
"""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

GATE_SECONDS = 2.0
"""So long at a time somebody who wants a lock alone lets newcomers wait: a rollback may be one of them."""
_LOOK_SECONDS = 0.001


@contextmanager
def file_lock(path: Path, shared: bool = False) -> Iterator[None]:
    """Hold the lock; waits as long as it takes."""
    descriptor = _open(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def crowd_lock(path: Path) -> Iterator[None]:
    """Hold the lock shared with many others, but let one who wants it alone (`solo_lock`) get in."""
    with file_lock(_gate(path), shared=True):
        descriptor = _open(path)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def reading_lock(path: Path) -> Iterator[None]:
    """As `crowd_lock`, also where the disk is read-only; without a lock file there, nobody writes either."""
    try:
        os.close(_open(path))
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
    else:
        with crowd_lock(path):
            yield
        return
    with contextlib.ExitStack() as held:
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY)
            held.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield


@contextmanager
def file_lock_if_free(path: Path) -> Iterator[bool]:
    """Hold the lock exclusively and give True, or give False at once where somebody holds it."""
    descriptor = _open(path)
    try:
        yield _is_ours(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def solo_lock(path: Path, seconds: float) -> Iterator[bool]:
    """Hold the lock alone and give True, or give False where others held it all the `seconds`.

    Newcomers wait at the gate while this waits for those inside, for GATE_SECONDS at a time: a crowd that never thins
    out does not keep it out, and one that stays long inside is not in the way of the others.
    """
    descriptor = _open(path)
    deadline = time.monotonic() + seconds
    try:
        while not (is_ours := _is_ours_behind_gate(descriptor, path, deadline)) and time.monotonic() < deadline:
            time.sleep(min(GATE_SECONDS, max(deadline - time.monotonic(), 0)))
        yield is_ours
    finally:
        os.close(descriptor)


def _is_ours_behind_gate(descriptor: int, path: Path, deadline: float) -> bool:
    with file_lock(_gate(path)):
        opens_at = min(time.monotonic() + GATE_SECONDS, deadline)
        while not (is_ours := _is_ours(descriptor)) and time.monotonic() < opens_at:
            time.sleep(_LOOK_SECONDS)
        return is_ours


def _is_ours(descriptor: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _gate(path: Path) -> Path:
    return path.with_name(f"{path.name}.gate")


def _open(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
