"""Fusion `residual`: the trained tensors take their places in the expansion's manifest. No tensor is read.

The result is the plain Hugging Face checkpoint of the expanded depth: same names, same headers, other digests. It
shares every object that training left alone with its base. `mansard_expansion.json` stays in it, so that the next
storey knows the ones below; loaders do not look at it.
"""

from dataclasses import replace

from mansard.errors import BadInput
from mansard.models.storeys import EXPANSION_FILE, Expansion, newest_tensors, read_expansion
from mansard.records import SnapshotId
from mansard.store.safetensors_header import TensorEntry
from mansard.store.snapshot import Blob, Manifest, TensorFile
from mansard.store.store import Store

TRAINED_FILE = "trained.safetensors"


def fuse(store: Store, expansion: SnapshotId, trained: SnapshotId) -> SnapshotId:
    """The fused model.

    `trained` holds `trained.safetensors` under the checkpoint's names: every tensor of the newest storey, and tensors
    of the base where training changed those. BadInput for a tensor too few or too many, of another shape or dtype.
    """
    manifest = store.manifest(expansion)
    new = _trained_file(store, trained)
    entries = {e.name: e for e in new.entries(TRAINED_FILE)}
    newest = newest_tensors(store, expansion)
    for name in newest:
        if name not in entries:
            raise BadInput(f"{TRAINED_FILE}: tensor {name!r} of a new block is missing; fuse what that training made")
    files: dict[str, Blob | TensorFile] = dict(manifest.files)
    placed: set[str] = set()
    for path, file in manifest.files.items():
        if isinstance(file, Blob) or "/" in path or not file.tensors.keys() & entries.keys():
            continue
        tensors = dict(file.tensors)
        for entry in file.entries(path):
            if entry.name in entries:
                _check_same_kind(entry, entries[entry.name])
                tensors[entry.name] = new.tensors[entry.name]
                placed.add(entry.name)
        files[path] = TensorFile(file.header, tensors, file.size_bytes)
    if entries.keys() - placed:
        raise BadInput(f"{TRAINED_FILE}: tensor {min(entries.keys() - placed)!r} is not in snapshot {expansion}")
    if entries.keys() - set(newest):
        told = _with_trained_base(read_expansion(store, expansion)).to_bytes()
        files[EXPANSION_FILE] = Blob(store.put_bytes(told), len(told))
    return store.put_manifest(Manifest(files))


def _with_trained_base(expansion: Expansion) -> Expansion:
    """The newest storey was trained together with tensors below it, so it cannot be taken away alone."""
    newest = replace(expansion.storeys[-1], has_trained_base=True)
    return replace(expansion, storeys=(*expansion.storeys[:-1], newest))


def _trained_file(store: Store, trained: SnapshotId) -> TensorFile:
    file = store.manifest(trained).files.get(TRAINED_FILE)
    if not isinstance(file, TensorFile):
        raise BadInput(f"snapshot {trained}: no {TRAINED_FILE} in it; the snapshot of a training is expected")
    return file


def _check_same_kind(old: TensorEntry, new: TensorEntry) -> None:
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        raise BadInput(
            f"{TRAINED_FILE}: tensor {new.name!r} is {new.dtype} {list(new.shape)}; the model has {old.dtype} "
            f"{list(old.shape)}"
        )
