"""Bytes on a local disk: whole reads and writes, copies inside the kernel, syncs; the disk's errors in our words."""

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mansard.errors import Corrupt, MansardError

CHUNK_BYTES = 1 << 20
DIRECT_BYTES = 1 << 20
"""Objects from this size up are written past the page cache."""
DIRECT_CHUNK_BYTES = 4 << 20

_NO_COPY_RANGE = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}
_ALL = 1 << 30
_BLOCK_BYTES = 4096


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


def copy_new(source: int, begin: int, target: int, size_bytes: int) -> None:
    """Copy a range into the new, empty file `target`, past the page cache where it is large and the disk can do so.

    2.1 GB of tensors took 1.6 to 1.9 s with eight threads, against 2.9 s through the page cache (`cp` and sync: 1.5),
    at half the processor time, 2026-11, on a busy machine: the disk begins at once and nothing waits for it twice.
    """
    if size_bytes >= DIRECT_BYTES:
        os.posix_fallocate(target, 0, size_bytes)  # a disk that is too full says so now
        if _copy_direct(source, begin, target, size_bytes):
            return
    copy_range(source, begin, target, 0, size_bytes)


def _copy_direct(source: int, begin: int, target: int, size_bytes: int) -> bool:
    """False where the disk takes no direct writes; then nothing was written."""
    flags = fcntl.fcntl(target, fcntl.F_GETFL)
    buffer = memoryview(mmap.mmap(-1, DIRECT_CHUNK_BYTES))  # a map begins at a page, as direct writes ask
    position = 0
    try:
        fcntl.fcntl(target, fcntl.F_SETFL, flags | os.O_DIRECT)
        for position in range(0, size_bytes, DIRECT_CHUNK_BYTES):
            count = min(DIRECT_CHUNK_BYTES, size_bytes - position)
            _read_all(source, buffer[:count], begin + position)
            whole_blocks = -(-count // _BLOCK_BYTES) * _BLOCK_BYTES
            write_all(target, buffer[:whole_blocks], position)
    except OSError as error:
        if error.errno != errno.EINVAL or position:
            raise
        return False
    finally:
        fcntl.fcntl(target, fcntl.F_SETFL, flags)
    os.truncate(target, size_bytes)  # the last block was written whole
    return True


def _read_all(descriptor: int, buffer: memoryview, position: int) -> None:
    """Fill the buffer; Corrupt where the file ends early."""
    while buffer:
        count = os.preadv(descriptor, [buffer], position)
        if count == 0:
            raise Corrupt(f"a file ended {len(buffer)} bytes early while it was copied; run: mansard verify")
        buffer, position = buffer[count:], position + count


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
