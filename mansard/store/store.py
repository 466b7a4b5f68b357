"""The store: objects, manifests (snapshots), recipes, lineage, pins, locks, scratch folders and materialized trees.

Guarantees: everything is written beside, fsynced and renamed, so a reader never sees half a thing and a kill loses
nothing but work; the same content taken twice takes its room once; a snapshot that is listed has all its objects.
Writers hold `locks/store` shared; the deleting phase of `collect` (collection.py) holds it exclusively. Work under way
holds a lease. Content lasts in the folder or in a bucket; locks, leases, scratch and trees are always this machine's,
so one host runs the control plane. Objects are compared with their digests when a tree or a file is made of them, not
when they are mapped.
"""

import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from mansard.digest import digest_bytes
from mansard.errors import BadInput, Corrupt
from mansard.records import SnapshotId
from mansard.site import Site
from mansard.store.backend import Backend, Listed
from mansard.store.disk import disk_errors
from mansard.store.folder import Folder
from mansard.store.format import check_format, check_owner, mark
from mansard.store.leases import Leases
from mansard.store.locks import crowd_lock, file_lock, reading_lock, solo_lock
from mansard.store.objects import ABSENT, Cut, Objects, file_state
from mansard.store.recipes import Recipes, checked_name, read_record, write_record
from mansard.store.safetensors_header import header_prefix
from mansard.store.snapshot import (
    Blob,
    Manifest,
    TensorEntry,
    TensorFile,
    is_digest,
    parse_safetensors_header,
    scan_tree,
)
from mansard.store.trees import TreeCache, fill, lay_out
from mansard.store.verification import Damage, Progress, find_damage

MANIFESTS = "manifests"
PINS = "pins"
TREE_CACHE_BYTES = 200 << 30
"""Room for the resident versions of a 70 B model quantized to 4 bits and one unquantized copy of it."""


class Store:
    """A folder, or a bucket with a folder as its cache. Several processes may use it at once."""

    def __init__(self, root: Path, url: str | None = None, tree_cache_bytes: int = TREE_CACHE_BYTES) -> None:
        self.root = root
        self.url = url
        self.leases = Leases(root / "leases")
        self._folder = Folder(root)
        self._tree_cache_bytes = tree_cache_bytes
        self._is_marked = False

    @staticmethod
    def of(site: Site) -> "Store":
        """The site's store."""
        return Store(site.store, site.store_url)

    @cached_property
    def backend(self) -> Backend:
        """Where content lasts. MansardError where the store's format is newer than this code."""
        check_format(self._folder, self._content)
        return self._content

    @cached_property
    def _content(self) -> Backend:
        """It remembers that a bucket is silent, so it is the same one when the format is asked for again."""
        return self._folder if self.url is None else _bucket(self.url, self.root)

    @cached_property
    def trees(self) -> TreeCache:
        return TreeCache(self.root, self._objects, self._tree_cache_bytes)

    @cached_property
    def _objects(self) -> Objects:
        return Objects(self.backend)

    @cached_property
    def _recipes(self) -> Recipes:
        return Recipes(self.backend)

    # Objects

    def put_bytes(self, data: bytes | memoryview) -> str:
        with self._writing():
            return self._objects.put_bytes(data)

    def put_file(self, path: Path) -> str:
        """A file's bytes as one object."""
        try:
            cut = Cut(path.name, path, state := file_state(path), [(0, state[0])])
        except OSError as error:
            raise BadInput(f"{path}: cannot be read: {error.strerror}") from error
        with self._writing():
            return self._objects.put_ranges([cut])[0][0]

    def put_zeros(self, size_bytes: int) -> str:
        """An object of zero bytes that takes no room on the disk."""
        with self._writing():
            return self._objects.put_zeros(size_bytes)

    def open_object(self, digest: str) -> memoryview:
        """A memory map of an object; Corrupt where it is absent. The bytes are not compared with the digest."""
        return self._objects.open(digest)

    # Snapshots

    def snapshot(self, tree: Path, progress: Progress | None = None) -> SnapshotId:
        """Take every file below `tree`; safetensors files tensor by tensor. BadInput as `scan_tree` and the headers."""
        cuts: list[Cut] = []
        headers: dict[str, tuple[str, tuple[TensorEntry, ...]]] = {}
        for name, path in scan_tree(tree).items():
            state = file_state(path)
            if name.endswith(".safetensors"):
                headers[name] = text, entries = parse_safetensors_header(path)
                offset = len(header_prefix(text))
                cuts.append(Cut(name, path, state, [(offset + e.begin, offset + e.end) for e in entries]))
            else:
                cuts.append(Cut(name, path, state, [(0, state[0])]))
        with self._writing():
            digests = self._objects.put_ranges(cuts, progress)
            return self._list(_manifest_of(cuts, digests, headers))

    def put_files(self, files: Mapping[str, bytes]) -> SnapshotId:
        """A snapshot of small files: relative path -> bytes."""
        with self._writing():
            return self._list(Manifest({p: Blob(self._objects.put_bytes(d), len(d)) for p, d in files.items()}))

    def put_manifest(self, manifest: Manifest) -> SnapshotId:
        """List a snapshot; BadInput where one of its objects is absent or of another size. Its objects are touched."""
        with self._writing():
            return self._list(manifest)

    def _list(self, manifest: Manifest) -> SnapshotId:
        wanted = list(manifest.objects())
        found = self._objects.touch_all({digest for _, _, digest, _ in wanted})
        for path, tensor, digest, size_bytes in wanted:
            if found.get(digest) != size_bytes:
                raise BadInput(
                    f"{path}: {tensor or 'the file'}: object {digest} of {size_bytes} bytes is expected in "
                    f"{self.backend.url}; {f'it has {found[digest]}' if digest in found else 'it is absent'}"
                )
        name, data = _manifest_name(manifest.id), manifest.to_bytes()
        if self.backend.read(name) == data:
            self.backend.touch([name])
        else:
            self.backend.write(name, data)
        return manifest.id

    def manifest(self, snapshot: SnapshotId) -> Manifest:
        """BadInput where it is unknown, Corrupt where it is damaged, MansardError where its format is another."""
        name = _manifest_name(snapshot)
        data = self.backend.read(name)
        if data is None:
            raise BadInput(f"snapshot {snapshot}: not in the store {self.backend.url}")
        if digest_bytes(data) != snapshot:
            raise Corrupt(
                f"snapshot {snapshot}: {self.backend.url}/{name} does not match its digest; "
                "remove it and run the stage again"
            )
        return Manifest.from_bytes(data, f"snapshot {snapshot}")

    def holds(self, snapshot: SnapshotId) -> bool:
        """The manifest and all its objects are there, with the right sizes."""
        try:
            manifest = self.manifest(snapshot)
        except BadInput:
            return False
        wanted = list(manifest.objects())
        found = self._objects.sizes({digest for _, _, digest, _ in wanted})
        return all(found.get(digest) == size for _, _, digest, size in wanted)

    def resolve(self, prefix: str) -> SnapshotId:
        """The snapshot whose id begins with `prefix`; BadInput where there is none or more than one."""
        found = [s for s in self.snapshots() if s.startswith(prefix)] if prefix else []
        if len(found) != 1:
            what = f"{len(found)} snapshots begin so; give more digits"
            raise BadInput(f"snapshot {prefix!r}: {what if found else f'not in the store {self.backend.url}'}")
        return found[0]

    def read_file(self, snapshot: SnapshotId, path: str) -> bytes:
        """One file's bytes; BadInput where the snapshot has no such file, Corrupt where they are damaged."""
        file = self.manifest(snapshot).files.get(path)
        if file is None:
            raise BadInput(f"snapshot {snapshot}: no file {path!r} in it")
        if isinstance(file, Blob):
            return self._checked(file.object, f"snapshot {snapshot}: {path}")
        parts = [header_prefix(file.header)]
        for entry in file.entries(path):
            parts.append(self._checked(file.tensors[entry.name], f"snapshot {snapshot}: {path}: tensor {entry.name}"))
        return b"".join(parts)

    def _checked(self, digest: str, what: str) -> bytes:
        data = bytes(self._objects.open(digest))
        if digest_bytes(data) != digest:
            raise Corrupt(f"{what}: object {digest} does not match its digest; run: mansard verify")
        return data

    def snapshots(self) -> list[SnapshotId]:
        """Every snapshot, by id."""
        names = (listed.name.partition("/")[2] for listed in self.backend.listed(MANIFESTS))
        return sorted(name for name in names if is_digest(name))

    def verify(self, snapshot: SnapshotId | None = None, progress: Progress | None = None) -> list[Damage]:
        """Hash the objects of one snapshot, or everything in the store; each object is read once."""
        manifests: dict[SnapshotId, Manifest | None] = {}
        for each in [snapshot] if snapshot else self.snapshots():
            manifests[each] = None
            with suppress(Corrupt):
                manifests[each] = self.manifest(each)
        damages = find_damage(self._objects, manifests, snapshot is None, progress)
        listed = set(self.snapshots())  # a collect may have run meanwhile
        return [d for d in damages if d.snapshot in listed or (not d.snapshot and d.what != ABSENT)]

    # Trees

    def restore(self, snapshot: SnapshotId, destination: Path) -> None:
        """Write the tree, byte for byte; `destination` must be absent or an empty folder."""
        target = Path(os.path.realpath(destination))
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise BadInput(f"{destination}: is there and not empty; name a new folder")
        beside = target.with_name(f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}")
        self.manifest(snapshot)  # before anything is made
        with disk_errors(target.parent), self._reading():
            manifest = self.manifest(snapshot)
            try:
                lay_out(manifest, beside)
                fill(self._objects, manifest, beside, 0o644)
                beside.replace(target)
            except BaseException:
                shutil.rmtree(beside, ignore_errors=True)
                raise

    def materialize(self, snapshot: SnapshotId) -> Path:
        """A read-only tree in the cache. It may be evicted once the cache needs room: see `using`."""
        with self.using(snapshot) as tree:
            return tree

    @contextmanager
    def using(self, snapshot: SnapshotId) -> Iterator[Path]:
        """A read-only tree that stays while the context lasts."""
        self.manifest(snapshot)  # before anything is made
        with self.trees.using(snapshot, lambda: self.manifest(snapshot)) as tree:
            yield tree

    # Recipes and lineage

    def recall(self, recipe: str) -> SnapshotId | None:
        """What the recipe made, where that is remembered and still held; it counts as used now."""
        snapshot = self._recipes.snapshot_of(recipe)
        if snapshot is None:
            return None
        with self._writing():
            if not self.holds(snapshot):
                return None
            self.backend.touch([_manifest_name(snapshot)])
        return snapshot

    def remember(self, recipe: str, snapshot: SnapshotId, lineage: Mapping[str, Any]) -> None:
        """Record that `recipe` made `snapshot`, and how; BadInput where the store does not hold it."""
        with self._writing():
            if not self.holds(snapshot):
                raise BadInput(f"recipe {recipe}: snapshot {snapshot} is not in the store {self.backend.url}")
            self._recipes.remember(recipe, snapshot, lineage)

    def lineage(self, snapshot: SnapshotId) -> list[dict[str, Any]]:
        """The records of every recipe that made the snapshot, oldest first where they say `begun_at`."""
        return self._recipes.lineage(snapshot)

    # What stays

    def pin(self, snapshot: SnapshotId, why: str = "") -> None:
        """Keep a snapshot until it is unpinned; BadInput where the store does not hold it."""
        with self._writing():
            if not self.holds(snapshot):
                raise BadInput(f"snapshot {snapshot}: not whole in the store {self.backend.url}; only what is can stay")
            write_record(self.backend, _pin_name(snapshot), {"why": why})

    def unpin(self, snapshot: SnapshotId) -> None:
        """BadInput where it is not pinned."""
        with self._writing():
            if self.backend.remove([_pin_name(snapshot)]) == 0:
                raise BadInput(f"snapshot {snapshot}: not pinned; mansard pin lists what is")

    def pins(self) -> dict[SnapshotId, str]:
        """Pinned snapshots, and why."""
        found = {}
        for listed in list(self.backend.listed(PINS)):
            record = read_record(self.backend, listed.name)
            if record is not None:
                found[listed.name.removeprefix(f"{PINS}/").removesuffix(".json")] = str(record["why"])
        return found

    @contextmanager
    def lease(self, snapshots: Collection[SnapshotId] = (), reach_seconds: float = 0.0) -> Iterator[None]:
        """While this lasts nothing goes that is used from now on, or was used in the `reach_seconds` before.

        `snapshots` count as used now.
        """
        with self._writing():
            descriptor, path = self.leases.take(reach_seconds)
            self.backend.touch([_manifest_name(snapshot) for snapshot in snapshots])
        try:
            yield
        finally:
            self.leases.give_back(descriptor, path)

    # Locks and scratch

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold the lock of that name; waits for whoever holds it, in this process or another."""
        with ExitStack() as held:
            with disk_errors(self.root):
                held.enter_context(file_lock(self.root / "locks" / checked_name(name)))
            yield

    @contextmanager
    def deleting(self, wait_seconds: float) -> Iterator[bool]:
        """Shut out whoever writes or lays out a tree; False where they did not leave within `wait_seconds`.

        NotAllowed where the store is a bucket that belongs to another home.
        """
        check_owner(self._folder, self.backend)
        with disk_errors(self.root), solo_lock(self._lock_file, wait_seconds) as is_ours:
            yield is_ours

    def work(self, recipe: str) -> Path:
        """A scratch folder of the recipe that survives a kill."""
        folder = self.root / "work" / checked_name(recipe)
        with disk_errors(self.root):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def scratch(self) -> Iterator[Listed]:
        """The files of all scratch folders."""
        return self._folder.listed("work")

    def discard_work(self, recipe: str) -> None:
        shutil.rmtree(self.root / "work" / checked_name(recipe), ignore_errors=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """While this lasts, nothing goes."""
        backend = self.backend
        with disk_errors(self.root), crowd_lock(self._lock_file):
            if not self._is_marked:
                mark(self._folder, backend)
                self._is_marked = True
            yield

    def _reading(self) -> AbstractContextManager[None]:
        """While this lasts, nothing goes; a read-only disk will do."""
        return reading_lock(self._lock_file)

    @property
    def _lock_file(self) -> Path:
        return self.root / "locks" / "store"


def _bucket(url: str, root: Path) -> Backend:
    from mansard.store.bucket import Bucket  # its client is loaded only where a site names a bucket

    return Bucket.at(url, root)


def _manifest_of(
    cuts: list[Cut], digests: list[list[str]], headers: Mapping[str, tuple[str, tuple[TensorEntry, ...]]]
) -> Manifest:
    files: dict[str, Blob | TensorFile] = {}
    for cut, made in zip(cuts, digests, strict=True):
        if cut.name in headers:
            text, entries = headers[cut.name]
            files[cut.name] = TensorFile(text, dict(zip((e.name for e in entries), made, strict=True)), cut.state[0])
        else:
            files[cut.name] = Blob(made[0], cut.state[0])
    return Manifest(files)


def _manifest_name(snapshot: SnapshotId) -> str:
    if not is_digest(snapshot):
        raise BadInput(f"snapshot {snapshot!r}: 64 hex digits are expected")
    return f"{MANIFESTS}/{snapshot}"


def _pin_name(snapshot: SnapshotId) -> str:
    return f"{PINS}/{snapshot}.json"
