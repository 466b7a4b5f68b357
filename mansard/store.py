"""The store: objects, manifests (snapshots), recipes, lineage, locks, scratch folders and materialized trees.

Guarantees: everything is written beside, fsynced and renamed, so a reader never sees half a thing and a kill loses
nothing but work; the same content taken twice takes its room once; a snapshot that is listed has all its objects.
Writers hold `locks/store` shared; the deleting phase of `collect` (not written yet) will hold it exclusively, and what
it then finds in `incoming` and under `trees/.*` belongs to nobody. Roots (`pin`) come with it. Objects are compared
with their digests when a tree or a file is made of them, not when they are mapped.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mansard.canonical import canonical_json, write_atomically
from mansard.digest import digest_bytes
from mansard.errors import BadInput, Corrupt, MansardError
from mansard.locks import file_lock
from mansard.objects import Cut, Objects, disk_errors, file_state
from mansard.records import SnapshotId
from mansard.safetensors_header import header_prefix
from mansard.snapshot import Blob, Manifest, TensorEntry, TensorFile, is_digest, parse_safetensors_header, scan_tree
from mansard.trees import TreeCache, fill, lay_out

TREE_CACHE_BYTES = 200 << 30
"""Room for the resident versions of a 70 B model quantized to 4 bits and one unquantized copy of it."""

MANIFEST_DAMAGED = "its manifest does not match its digest"

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass(frozen=True, slots=True)
class Damage:
    """An object (or manifest) that is not what its digest says. `snapshot` and `file` are empty where none uses it."""

    snapshot: SnapshotId
    file: str
    tensor: str | None
    digest: str
    what: str

    def __str__(self) -> str:
        """One line, with the file to remove so that taking or deriving the content again brings it back."""
        place = f"snapshot {self.snapshot}" if self.snapshot else "used by no snapshot"
        file = f": {self.file}" if self.file else ""
        tensor = f": tensor {self.tensor}" if self.tensor else ""
        folder = "manifests" if self.what == MANIFEST_DAMAGED else f"objects/{self.digest[:2]}"
        remedy = f"remove {folder}/{self.digest}, then take or derive it again"
        return f"{place}{file}{tensor}: {self.what}; {remedy}"


class Store:
    """A folder. Several processes may use it at once."""

    def __init__(self, root: Path, tree_cache_bytes: int = TREE_CACHE_BYTES) -> None:
        self.root = root
        self._objects = Objects(root)
        self._trees = TreeCache(root, self._objects, tree_cache_bytes)

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
        files: dict[str, Blob | TensorFile] = {}
        for cut, made in zip(cuts, digests, strict=True):
            if cut.name in headers:
                text, entries = headers[cut.name]
                files[cut.name] = TensorFile(
                    text, dict(zip((e.name for e in entries), made, strict=True)), cut.state[0]
                )
            else:
                files[cut.name] = Blob(made[0], cut.state[0])
        return self.put_manifest(Manifest(files))

    def put_files(self, files: Mapping[str, bytes]) -> SnapshotId:
        """A snapshot of small files: relative path -> bytes."""
        return self.put_manifest(Manifest({p: Blob(self.put_bytes(d), len(d)) for p, d in files.items()}))

    def put_manifest(self, manifest: Manifest) -> SnapshotId:
        """List a snapshot; BadInput where one of its objects is absent or of another size. Its objects are touched."""
        with self._writing():
            for path, tensor, digest, size_bytes in manifest.objects():
                if not self._objects.touch(digest, size_bytes):
                    found = self._objects.size_bytes(digest)
                    raise BadInput(
                        f"{path}: {tensor or 'the file'}: object {digest} of {size_bytes} bytes is expected in "
                        f"{self.root}; {'it is absent' if found is None else f'it has {found}'}"
                    )
            path_of, data = self._manifest_path(manifest.id), manifest.to_bytes()
            if path_of.is_file() and path_of.read_bytes() == data:
                os.utime(path_of)
            else:
                write_atomically(path_of, data, 0o444)
        return manifest.id

    def manifest(self, snapshot: SnapshotId) -> Manifest:
        """BadInput where it is unknown, Corrupt where it is damaged, MansardError where its format is another."""
        path = self._manifest_path(snapshot)
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise BadInput(f"snapshot {snapshot}: not in the store {self.root}") from error
        if digest_bytes(data) != snapshot:
            raise Corrupt(f"snapshot {snapshot}: {path} does not match its digest; remove it and run the stage again")
        return Manifest.from_bytes(data, f"snapshot {snapshot}")

    def holds(self, snapshot: SnapshotId) -> bool:
        """The manifest and all its objects are there, with the right sizes."""
        try:
            manifest = self.manifest(snapshot)
        except BadInput:
            return False
        return all(self._objects.size_bytes(digest) == size for _, _, digest, size in manifest.objects())

    def resolve(self, prefix: str) -> SnapshotId:
        """The snapshot whose id begins with `prefix`; BadInput where there is none or more than one."""
        found = [s for s in self.snapshots() if s.startswith(prefix)] if prefix else []
        if len(found) != 1:
            what = f"{len(found)} snapshots begin so; give more digits" if found else f"not in the store {self.root}"
            raise BadInput(f"snapshot {prefix!r}: {what}")
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

    # Trees

    def restore(self, snapshot: SnapshotId, destination: Path) -> None:
        """Write the tree, byte for byte; `destination` must be absent or an empty folder."""
        manifest = self.manifest(snapshot)
        target = Path(os.path.realpath(destination))
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise BadInput(f"{destination}: is there and not empty; name a new folder")
        beside = target.with_name(f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}")
        with disk_errors(target.parent), self._sharing():
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
        with self._trees.using(self.manifest(snapshot)) as tree:
            yield tree

    # Checks

    def verify(self, snapshot: SnapshotId | None = None, progress: Progress | None = None) -> list[Damage]:
        """Hash the objects of one snapshot, or everything in the store; each object is read once."""
        damages: list[Damage] = []
        uses: dict[str, list[tuple[SnapshotId, str, str | None, int | None]]] = {}
        for each in [snapshot] if snapshot else self.snapshots():
            try:
                manifest = self.manifest(each)
            except Corrupt:
                damages.append(Damage(each, "", None, each, MANIFEST_DAMAGED))
                continue
            for path, tensor, digest, size_bytes in manifest.objects():
                uses.setdefault(digest, []).append((each, path, tensor, size_bytes))
        if snapshot is None:
            for digest in self._objects.digests():
                uses.setdefault(digest, [("", "", None, None)])
        for digest, what in self._objects.check({d: u[0][3] for d, u in uses.items()}, progress):
            damages += [Damage(each, path, tensor, digest, what) for each, path, tensor, _ in uses[digest]]
        return sorted(damages, key=lambda d: (d.snapshot, d.file, d.tensor or ""))

    def snapshots(self) -> list[SnapshotId]:
        """Every snapshot, by id."""
        folder = self.root / "manifests"
        return sorted(p.name for p in folder.iterdir() if is_digest(p.name)) if folder.is_dir() else []

    # Recipes and lineage

    def recall(self, recipe: str) -> SnapshotId | None:
        """What the recipe made, where that is remembered and still held."""
        record = self._read_record(self.root / "recipes" / f"{_checked_name(recipe)}.json")
        if record is None or not self.holds(record["snapshot"]):
            return None
        return str(record["snapshot"])

    def remember(self, recipe: str, snapshot: SnapshotId, lineage: Mapping[str, Any]) -> None:
        """Record that `recipe` made `snapshot`, and how; BadInput where the store does not hold it."""
        if not self.holds(snapshot):
            raise BadInput(f"recipe {recipe}: snapshot {snapshot} is not in the store {self.root}")
        name = f"{_checked_name(recipe)}.json"
        with self._writing():
            write_atomically(self.root / "lineage" / snapshot / name, canonical_json({"format": 1, **lineage}))
            record = {"format": 1, "snapshot": snapshot}
            write_atomically(self.root / "recipes" / name, canonical_json(record))

    def lineage(self, snapshot: SnapshotId) -> list[dict[str, Any]]:
        """The records of every recipe that made the snapshot, oldest first where they say `begun_at`."""
        folder = self.root / "lineage" / snapshot
        records = [self._read_record(p) for p in sorted(folder.glob("[!.]*.json"))]
        return sorted((r for r in records if r is not None), key=lambda r: str(r.get("begun_at", "")))

    def _read_record(self, path: Path) -> dict[str, Any] | None:
        try:
            record: dict[str, Any] = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise Corrupt(f"{path}: damaged ({error}); remove it and run again") from error
        if record.get("format") != 1:
            raise MansardError(f"{path}: format {record.get('format')!r}; this Mansard reads format 1: use a newer one")
        return record

    # Locks and scratch

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold the lock of that name; waits for whoever holds it, in this process or another."""
        with ExitStack() as held:
            with disk_errors(self.root):
                held.enter_context(file_lock(self.root / "locks" / _checked_name(name)))
            yield

    def work(self, recipe: str) -> Path:
        """A scratch folder of the recipe that survives a kill."""
        folder = self.root / "work" / _checked_name(recipe)
        with disk_errors(self.root):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def discard_work(self, recipe: str) -> None:
        shutil.rmtree(self.root / "work" / _checked_name(recipe), ignore_errors=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with disk_errors(self.root), self._sharing():
            yield

    def _sharing(self) -> AbstractContextManager[None]:
        """While this lasts, no object goes."""
        return file_lock(self.root / "locks" / "store", shared=True)

    def _manifest_path(self, snapshot: SnapshotId) -> Path:
        if not is_digest(snapshot):
            raise BadInput(f"snapshot {snapshot!r}: 64 hex digits are expected")
        return self.root / "manifests" / snapshot


def _checked_name(name: str) -> str:
    assert name and "/" not in name and not name.startswith("."), f"bad name {name!r}"
    return name
