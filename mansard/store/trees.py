"""Trees written out of objects: a folder that somebody asked for, and the bounded cache of read-only trees.

Guarantees: a tree is complete or absent (built beside, fsynced, renamed) and every byte was compared with its digest
while it was written. The cache evicts the least recently used trees that nobody holds. Trees are full copies, never
links, so nothing done to a tree reaches the store. What happens to a tree after it was built is not watched.
"""

import errno
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from mansard.errors import Corrupt, MansardError
from mansard.records import SnapshotId
from mansard.store.disk import disk_errors, read_chunks, sync_folder, write_all
from mansard.store.locks import crowd_lock, file_lock, file_lock_if_free
from mansard.store.objects import Objects
from mansard.store.safetensors_header import header_prefix
from mansard.store.snapshot import Blob, Manifest

_NUM_THREADS = 4
_SYNC_BYTES = 8 << 20
"""Pieces from this size up go to the disk at once: 1.3 GiB/s with four threads against 0.9 with fsync at the end (`cp`
and sync: 1.45), files of 0.5 GB, 2026-11. Smaller ones wait for their file's fsync."""


def lay_out(manifest: Manifest, folder: Path) -> None:
    """Make every file of the new folder `folder` at its full size, with headers, without tensors."""
    folder.mkdir(parents=True)
    for path, file in manifest.files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as empty:
            if not isinstance(file, Blob):
                empty.write(header_prefix(file.header))
            empty.truncate(file.size_bytes)


def fill(objects: Objects, manifest: Manifest, folder: Path, mode: int) -> None:
    """Write the content into what `lay_out` made and give the files `mode`; fsynced, checked by digest."""
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        _finish(pool, [pool.submit(_write_piece, objects, folder, piece) for piece in _pieces(manifest)])
        _finish(pool, [pool.submit(_close_file, folder / path, mode) for path in manifest.files])
    for below, _, _ in os.walk(folder):
        sync_folder(Path(below))


@dataclass(frozen=True, slots=True)
class _Piece:
    """An object's place in a file."""

    path: str
    tensor: str | None
    digest: str
    begin: int
    size_bytes: int

    @property
    def place(self) -> str:
        return f"{self.path}: tensor {self.tensor}" if self.tensor else self.path

    def damaged(self, what: str) -> Corrupt:
        return Corrupt(f"{self.place}: object {self.digest} {what}; run: mansard verify")


def _pieces(manifest: Manifest) -> Iterator[_Piece]:
    for path, file in manifest.files.items():
        if isinstance(file, Blob):
            yield _Piece(path, None, file.object, 0, file.size_bytes)
        else:
            offset = len(header_prefix(file.header))
            for entry in file.entries(path):
                yield _Piece(path, entry.name, file.tensors[entry.name], offset + entry.begin, entry.size_bytes)


def _write_piece(objects: Objects, folder: Path, piece: _Piece) -> None:
    """Copy and hash in one pass, so that the bytes written are the bytes checked."""
    target = os.open(folder / piece.path, os.O_WRONLY)
    source = -1
    try:
        source = objects.descriptor(piece.digest, f"{piece.place}: ")
        if (found := os.fstat(source).st_size) != piece.size_bytes:
            raise piece.damaged(f"has {found} bytes, {piece.size_bytes} are expected")
        hasher = blake3()
        is_hole = _is_hole(source)
        for begin, chunk in read_chunks(source, 0, piece.size_bytes):
            hasher.update(chunk)
            if not is_hole:
                write_all(target, chunk, piece.begin + begin)
        if hasher.hexdigest() != piece.digest:
            raise piece.damaged("does not match its digest")
        if piece.size_bytes >= _SYNC_BYTES:
            os.fdatasync(target)  # one thread waits for the disk while others fill memory
    finally:
        os.close(target)
        if source >= 0:
            os.close(source)


def _is_hole(descriptor: int) -> bool:
    """True for an object of zeros that takes no room: then the new file keeps its hole."""
    try:
        os.lseek(descriptor, 0, os.SEEK_DATA)
    except OSError as error:
        return error.errno == errno.ENXIO
    return False


def _close_file(path: Path, mode: int) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fchmod(descriptor, mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _finish(pool: ThreadPoolExecutor, futures: "list[Future[None]]") -> None:
    """Wait for all; the first error ends the rest."""
    try:
        for future in as_completed(futures):
            future.result()
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise


class TreeCache:
    """Read-only trees under `root/trees`, `bound_bytes` of them at the most. A tree is held by a shared lock."""

    def __init__(self, root: Path, objects: Objects, bound_bytes: int) -> None:
        self._folder = root / "trees"
        self._locks = root / "locks"
        self._objects = objects
        self._bound_bytes = bound_bytes

    @contextmanager
    def using(self, snapshot: SnapshotId, load: Callable[[], Manifest]) -> Iterator[Path]:
        """The tree's folder, built where it is absent; not evicted while the context lasts.

        `load` reads the manifest, while nothing can go from the store.
        """
        tree = self._folder / snapshot
        with ExitStack() as held:
            while not self._is_held(tree, held):
                with disk_errors(self._folder), file_lock(self._lock(snapshot)):
                    if not tree.is_dir():
                        self._build(load, tree)
            yield tree

    def _is_held(self, tree: Path, held: ExitStack) -> bool:
        """True, and `held` keeps the tree, where it is there."""
        with ExitStack() as taken, disk_errors(self._folder):
            taken.enter_context(file_lock(self._lock(tree.name), shared=True))
            if not tree.is_dir():
                return False
            os.utime(tree)
            held.push(taken.pop_all())
        return True

    def sweep(self, listed: Collection[SnapshotId]) -> int:
        """Remove trees of no listed snapshot that nobody uses, and halves of trees; the bytes that this freed.

        Only while the store's lock is held exclusively: then nobody builds one.
        """
        freed_bytes = 0
        for tree in sorted(self._folder.iterdir()) if self._folder.is_dir() else []:
            if tree.name.startswith(".") or tree.name not in listed:
                with file_lock_if_free(self._lock(tree.name.lstrip("."))) as is_ours:
                    if is_ours:
                        freed_bytes += _tree_bytes(tree)
                        _remove(tree)
        return freed_bytes

    def _build(self, load: Callable[[], Manifest], tree: Path) -> None:
        """Under the tree's lock, so what lies beside was left by a writer that died.

        Names below `trees` change only under the lock of all trees, and files get their size there, so that builders
        see and count each other.
        """
        beside = tree.with_name(f".{tree.name}")
        all_trees = self._locks / "trees"
        with disk_errors(self._folder), crowd_lock(self._locks / "store"):
            manifest = load()
            try:
                with file_lock(all_trees):
                    shutil.rmtree(beside, ignore_errors=True)
                    self._make_room(manifest)
                    lay_out(manifest, beside)
                fill(self._objects, manifest, beside, 0o444)
            except BaseException:
                with file_lock(all_trees):
                    shutil.rmtree(beside, ignore_errors=True)
                raise
            with file_lock(all_trees):
                beside.replace(tree)
            sync_folder(self._folder)

    def _make_room(self, manifest: Manifest) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        trees = sorted(self._folder.iterdir(), key=lambda p: p.stat().st_mtime)
        sizes = {tree: _tree_bytes(tree) for tree in trees}
        excess = sum(sizes.values()) + manifest.size_bytes - self._bound_bytes
        for tree in trees:
            if excess <= 0:
                return
            with file_lock_if_free(self._lock(tree.name.lstrip("."))) as is_ours:
                if is_ours:
                    _remove(tree)
                    excess -= sizes[tree]
        if excess > 0:
            raise MansardError(
                f"{self._folder}: a tree of {manifest.size_bytes} bytes does not fit into a cache of "
                f"{self._bound_bytes} beside the trees in use; {excess} bytes are missing: make the cache larger or "
                "stop an engine"
            )

    def _lock(self, snapshot: SnapshotId) -> Path:
        return self._locks / f"tree-{snapshot}"


def _remove(tree: Path) -> None:
    """Under the tree's lock. Renamed first, so that nobody sees half of it under its name."""
    beside = tree.with_name(f".{tree.name.lstrip('.')}")
    if tree != beside:
        shutil.rmtree(beside, ignore_errors=True)
        tree.replace(beside)
    shutil.rmtree(beside)


def _tree_bytes(tree: Path) -> int:
    return sum((Path(below) / name).lstat().st_size for below, _, names in os.walk(tree) for name in names)
