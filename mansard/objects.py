"""The folder of objects: one tensor's bytes or one small file each, named by their BLAKE3, 256 folders.

Guarantees: an object is complete or absent (written in `incoming`, fsynced, renamed); two writers of one object do no
harm; an object that is there is touched, never rewritten (one of another size, which is damage, is replaced). What lies
in `incoming` while nobody writes is garbage. Whether bytes still match their digest is for the store's `verify`.
"""

import errno
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from mansard.digest import digest_bytes, digest_zeros
from mansard.errors import BadInput, Corrupt, MansardError

NUM_THREADS = 4
"""Two keep two cores hashing and copying while two wait for the disk (fsync). Hashing and copying release the GIL."""

_NO_COPY_RANGE = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}
_ALL = 1 << 30
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Cut:
    """Byte ranges (begin, end) of a file (`name` in its tree) as it was when `state` (size, mtime, ctime) was taken."""

    name: str
    path: Path
    state: tuple[int, int, int]
    ranges: Sequence[tuple[int, int]]

    def check_unchanged(self, descriptor: int) -> None:
        if _state(os.fstat(descriptor)) != self.state:
            raise BadInput(f"{self.path}: changed while it was read; wait until nobody writes it, then run again")


def file_state(path: Path) -> tuple[int, int, int]:
    """What a file looks like from outside; take it before reading anything that a cut relies on."""
    return _state(path.stat())


class Objects:
    """Objects under `root/objects`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folder = root / "objects"
        self._incoming = root / "incoming"

    def path(self, digest: str) -> Path:
        return self._folder / digest[:2] / digest

    def size_bytes(self, digest: str) -> int | None:
        """Bytes of an object as it lies there; None where it is absent."""
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            return None

    def touch(self, digest: str, size_bytes: int) -> bool:
        """True, and the object counts as used now, where it is there with that size."""
        if self.size_bytes(digest) != size_bytes:
            return False
        os.utime(self.path(digest))
        return True

    def open(self, digest: str) -> memoryview:
        """The object's bytes as a memory map that lives as long as the view does."""
        path = self.path(digest)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise Corrupt(f"object {digest} is not in the store {self._root}; run: mansard verify") from error
        try:
            size_bytes = os.fstat(descriptor).st_size
            return memoryview(mmap.mmap(descriptor, size_bytes, prot=mmap.PROT_READ) if size_bytes else b"")
        finally:
            os.close(descriptor)

    def digests(self) -> Iterator[str]:
        """Every object that is there."""
        for folder in sorted(self._folder.glob("[0-9a-f][0-9a-f]")):
            yield from sorted(p.name for p in folder.iterdir())

    def put_bytes(self, data: bytes | memoryview) -> str:
        view = memoryview(data).cast("B")
        digest = digest_bytes(view)
        if not self.touch(digest, len(view)):
            self._add(digest, lambda descriptor: write_all(descriptor, view, 0))
            sync_folder(self.path(digest).parent)
        return digest

    def put_zeros(self, size_bytes: int) -> str:
        """An object of zero bytes; a sparse file, so it takes no room."""
        digest = digest_zeros(size_bytes)
        if not self.touch(digest, size_bytes):
            self._add(digest, lambda descriptor: os.truncate(descriptor, size_bytes))
            sync_folder(self.path(digest).parent)
        return digest

    def put_ranges(self, cuts: Sequence[Cut], progress: Callable[[int, int], None] | None = None) -> list[list[str]]:
        """The digests of every cut's ranges, in their order. `progress(bytes done, bytes in all)`.

        BadInput where a file is no longer what it was when the cut was made.
        """
        total = sum(end - begin for cut in cuts for begin, end in cut.ranges)
        done = 0
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            made = [[pool.submit(self._put_range, cut, begin, end) for begin, end in cut.ranges] for cut in cuts]
            pairs = zip((f for one in made for f in one), (r for cut in cuts for r in cut.ranges), strict=True)
            sizes = {future: end - begin for future, (begin, end) in pairs}
            for future in _each(list(sizes), pool):
                done += sizes[future]
                if progress is not None:
                    progress(done, total)
        digests = [[future.result() for future in futures] for futures in made]
        for folder in {self.path(d).parent for one in digests for d in one}:
            sync_folder(folder)
        return digests

    def check(
        self, sizes: Mapping[str, int | None], progress: Callable[[int, int], None] | None = None
    ) -> Iterator[tuple[str, str]]:
        """(digest, what is wrong) of the objects that are not what their digest, or the size given, says."""
        found = {digest: self.size_bytes(digest) for digest in sizes}
        total, done = sum(size or 0 for size in found.values()), 0
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            sound = pool.map(self._is_sound, sizes)
            for (digest, wanted), is_sound in zip(sizes.items(), sound, strict=True):
                size_bytes = found[digest]
                if size_bytes is None:
                    yield digest, "absent"
                elif wanted is not None and size_bytes != wanted:
                    yield digest, f"has {size_bytes} bytes, {wanted} are expected"
                elif not is_sound:
                    yield digest, "its bytes do not match its digest"
                done += size_bytes or 0
                if progress is not None:
                    progress(done, total)

    def _is_sound(self, digest: str) -> bool:
        return self.size_bytes(digest) is not None and digest_bytes(self.open(digest)) == digest

    def _put_range(self, cut: Cut, begin: int, end: int) -> str:
        """Hash first (a known object is then only touched), copy second, and see that the file stayed the same."""
        descriptor = os.open(cut.path, os.O_RDONLY)
        try:
            cut.check_unchanged(descriptor)
            digest = _digest_range(descriptor, begin, end)
            cut.check_unchanged(descriptor)
            if not self.touch(digest, end - begin):

                def fill(target: int) -> None:
                    try:
                        copy_range(descriptor, begin, target, 0, end - begin)
                    finally:
                        cut.check_unchanged(descriptor)

                self._add(digest, fill)
        finally:
            os.close(descriptor)
        return digest

    def _add(self, digest: str, fill: Callable[[int], object]) -> None:
        path = self.path(digest)
        self._incoming.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._incoming / f"{digest}.{os.getpid()}.{os.urandom(4).hex()}"
        try:
            descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)
            try:
                fill(descriptor)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            beside.replace(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


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
                target, os.pread(source, min(rest, _CHUNK_BYTES), source_begin + copied), target_begin + copied
            )
        if step == 0:
            raise Corrupt(f"a file ended {size_bytes - copied} bytes early while it was copied; run: mansard verify")
        copied += step


def read_chunks(descriptor: int, begin: int, end: int) -> Iterator[tuple[int, memoryview]]:
    """(position, bytes) of a range, in one buffer that is used again; ends early where the file does."""
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, end - begin)))
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


def _each(futures: "list[Future[str]]", pool: ThreadPoolExecutor) -> "Iterator[Future[str]]":
    """Futures as they end; the first error ends the rest."""
    try:
        for future in as_completed(futures):
            future.result()
            yield future
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise


def _state(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _digest_range(descriptor: int, begin: int, end: int) -> str:
    """Read, not mapped: a map of a file that somebody cuts short ends the process (SIGBUS). Objects never shrink."""
    hasher = blake3()
    for _, chunk in read_chunks(descriptor, begin, end):
        hasher.update(chunk)
    return str(hasher.hexdigest())
