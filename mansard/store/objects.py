"""Objects: one tensor's bytes or one small file each, named by their BLAKE3, in whatever backend holds them.

Guarantees: an object is complete or absent; two writers of one object do no harm; an object that is there is touched,
never rewritten (one of another size, which is damage, is replaced). Whether bytes still match their digest is for the
store's `verify`.
"""

import mmap
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from mansard.digest import digest_bytes, digest_zeros
from mansard.errors import BadInput, Corrupt
from mansard.store.backend import OBJECTS, Backend, object_name
from mansard.store.disk import copy_new, read_chunks, write_all

ABSENT = "absent"

NUM_READERS = 4
NUM_WRITERS = 8
"""Some keep the cores hashing and copying while the others wait for the disk. All of it releases the GIL."""


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
    """The objects of a backend."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def sizes(self, digests: Collection[str]) -> dict[str, int]:
        """Bytes of the objects that are there."""
        names = {object_name(digest): digest for digest in digests}
        return {names[name]: size for name, size in self._backend.sizes(names).items()}

    def size_bytes(self, digest: str) -> int | None:
        """Bytes of an object as it lies there; None where it is absent."""
        return self.sizes([digest]).get(digest)

    def touch(self, digest: str, size_bytes: int) -> bool:
        """True, and the object counts as used now, where it is there with that size."""
        return self._backend.touch([object_name(digest)]).get(object_name(digest)) == size_bytes

    def touch_all(self, digests: Collection[str]) -> dict[str, int]:
        """Count objects as used now; bytes of those that are there."""
        names = {object_name(digest): digest for digest in digests}
        return {names[name]: size for name, size in self._backend.touch(names).items()}

    def descriptor(self, digest: str, where: str = "") -> int:
        """A file descriptor to read the object; Corrupt, beginning with `where`, when it is absent."""
        try:
            return self._backend.open(object_name(digest))
        except FileNotFoundError as error:
            raise Corrupt(
                f"{where}object {digest} is not in the store {self._backend.url}; run: mansard verify"
            ) from error

    def open(self, digest: str) -> memoryview:
        """The object's bytes as a memory map that lives as long as the view does."""
        descriptor = self.descriptor(digest)
        try:
            size_bytes = os.fstat(descriptor).st_size
            return memoryview(mmap.mmap(descriptor, size_bytes, prot=mmap.PROT_READ) if size_bytes else b"")
        finally:
            os.close(descriptor)

    def digests(self) -> Iterator[str]:
        """Every object that is there."""
        for listed in self._backend.listed(OBJECTS):
            yield listed.name.rpartition("/")[2]

    def put_bytes(self, data: bytes | memoryview) -> str:
        view = memoryview(data).cast("B")
        digest = digest_bytes(view)
        self._put(digest, len(view), lambda descriptor: write_all(descriptor, view, 0))
        return digest

    def put_zeros(self, size_bytes: int) -> str:
        """An object of zero bytes; a sparse file, so it takes no room on a disk."""
        digest = digest_zeros(size_bytes)
        self._put(digest, size_bytes, lambda descriptor: os.truncate(descriptor, size_bytes))
        return digest

    def put_ranges(self, cuts: Sequence[Cut], progress: Callable[[int, int], None] | None = None) -> list[list[str]]:
        """The digests of every cut's ranges, in their order. `progress(bytes done, bytes in all)`.

        BadInput where a file is no longer what it was when the cut was made.
        """
        total = sum(end - begin for cut in cuts for begin, end in cut.ranges)
        done = 0
        with ThreadPoolExecutor(NUM_WRITERS) as pool:
            made = [[pool.submit(self._put_range, cut, begin, end) for begin, end in cut.ranges] for cut in cuts]
            pairs = zip((f for one in made for f in one), (r for cut in cuts for r in cut.ranges), strict=True)
            sizes = {future: end - begin for future, (begin, end) in pairs}
            for future in _each(list(sizes), pool):
                done += sizes[future]
                if progress is not None:
                    progress(done, total)
        digests = [[future.result() for future in futures] for futures in made]
        self._backend.settle({object_name(digest) for one in digests for digest in one})
        return digests

    def check(
        self, sizes: Mapping[str, int | None], progress: Callable[[int, int], None] | None = None
    ) -> Iterator[tuple[str, str]]:
        """(digest, what is wrong) of the objects that are not what their digest, or the size given, says."""
        found = self.sizes(sizes)
        total, done = sum(found.values()), 0
        with ThreadPoolExecutor(NUM_READERS) as pool:
            digests = pool.map(lambda digest: self._backend.digest(object_name(digest)), sizes)
            for (digest, wanted), now in zip(sizes.items(), digests, strict=True):
                size_bytes = found.get(digest)
                if size_bytes is None or now is None:
                    yield digest, ABSENT
                elif wanted is not None and size_bytes != wanted:
                    yield digest, f"has {size_bytes} bytes, {wanted} are expected"
                elif now != digest:
                    yield digest, "its bytes do not match its digest"
                done += size_bytes or 0
                if progress is not None:
                    progress(done, total)

    def _put(self, digest: str, size_bytes: int, fill: Callable[[int], object]) -> None:
        if not self.touch(digest, size_bytes):
            self._backend.add(object_name(digest), fill)
            self._backend.settle([object_name(digest)])

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
                        copy_new(descriptor, begin, target, end - begin)
                    finally:
                        cut.check_unchanged(descriptor)

                self._backend.add(object_name(digest), fill)
        finally:
            os.close(descriptor)
        return digest


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
