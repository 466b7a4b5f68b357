"""Bytes on a local disk: whole reads and writes, copies inside the kernel, syncs; the disk's errors in our words."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mansard.errors import Corrupt, MansardError

CHUNK_BYTES = 1 << 20

_NO_COPY_RANGE = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}
_ALL = 1 << 30


def copy_range(source: int, source_begin: int, target: int, target_begin: int, size_bytes: int) -> None:
    """Copy bytes between files inside the kernel; raises OSError, and Corrupt where the source ends early."""
    copied = 0
    while copied < size_bytes:
        rest = min(size_bytes - copied, _ALL)
        try:
            step = os.copy_file_range(source, target, rest, source_begin + copied, target_begin + copied)
        except OSError as error:
            if error.errno not in _NO_COPY_RANGE:
                raise
            step = os.pwrite(
                target, os.pread(source, min(rest, CHUNK_BYTES), source_begin + copied), target_begin + copied
            )
        if step == 0:
            raise Corrupt(f"a file ended {size_bytes - copied} bytes early while it was copied; run: mansard verify")
        copied += step


def read_chunks(descriptor: int, begin: int, end: int) -> Iterator[tuple[int, memoryview]]:
    """(position, bytes) of a range, in one buffer that is used again; ends early where the file does."""
    buffer = memoryview(bytearray(min(CHUNK_BYTES, end - begin)))
    while begin < end:
        count = os.preadv(descriptor, [buffer[: end - begin]], begin)
        if count == 0:
            return
        yield begin, buffer[:count]
        begin += count


def write_all(descriptor: int, data: memoryview, position: int) -> None:
    """Write every byte at `position`."""
    while data:
        count = os.pwrite(descriptor, data, position)
        data, position = data[count:], position + count


def sync_folder(folder: Path) -> None:
    """Make renames into `folder` last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """A full or read-only disk below `folder` becomes one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise MansardError(
                f"{folder}: the disk is full ({error.strerror}); nothing was lost: free some room and run again"
            ) from error
        raise MansardError(
            f"{error.filename or folder}: {error.strerror}; {folder} must be readable and writable"
        ) from error
