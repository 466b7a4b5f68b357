"""A storey taken away, on the manifest: its blocks go, those above move down, config.json and index follow.

What remains must be a model that was: nothing above may have been trained on the storey. A storey above that is still
silent (every last factor has its first value) computes the identity with or without it; one that was trained saw its
output. Guarantees that every tensor that stays is the object it was. No tensor is read.
"""

from collections.abc import Mapping
from dataclasses import replace

from mansard.errors import BadInput
from mansard.models.constants import Constants
from mansard.models.families import Family, family_of
from mansard.models.model_files import model_config, pretty_json, rebuilt_index, weight_files
from mansard.models.rebuilding import rebuilt_config
from mansard.models.storeys import EXPANSION_FILE, Expansion, NewBlock, Storey, read_expansion
from mansard.records import SnapshotId
from mansard.store.safetensors_header import TensorEntry, compose_header, header_metadata, header_prefix
from mansard.store.snapshot import CONFIG_FILE, INDEX_FILE, Blob, Manifest, TensorFile, read_json_object
from mansard.store.store import Store


def remove_storey(store: Store, model: SnapshotId, storey: int) -> SnapshotId:
    """The model without its `storey` (1 is the oldest); BadInput says why one cannot be taken away."""
    check_removable(store, model, storey)
    return store.put_manifest(without_storey(store, model, storey))


def without_storey(store: Store, model: SnapshotId, storey: int) -> Manifest:
    """The manifest of what is left, whatever was trained on the storey."""
    expansion, config = read_expansion(store, model), model_config(store, model)
    family = family_of(config)
    manifest = store.manifest(model)
    gone = {b.index for b in expansion.storeys[storey - 1].new_blocks}
    kept = [i for i in range(expansion.depth) if i not in gone]
    files: dict[str, Blob | TensorFile] = dict(manifest.files)
    made = {path: _without(file, family, kept) for path, file in weight_files(manifest).items()}
    for path, file in made.items():
        if file.tensors:
            files[path] = file
        else:
            del files[path]
    small = {CONFIG_FILE: pretty_json(rebuilt_config(family, config, kept))}
    if INDEX_FILE in files:
        index = read_json_object(store.read_file(model, INDEX_FILE), INDEX_FILE)
        small[INDEX_FILE] = pretty_json(rebuilt_index(index, made))
    remaining = _remaining(expansion, storey, kept)
    if remaining is None:
        del files[EXPANSION_FILE]
    else:
        small[EXPANSION_FILE] = remaining.to_bytes()
    blobs = {path: Blob(store.put_bytes(data), len(data)) for path, data in small.items()}
    return Manifest({**files, **blobs})


def check_removable(store: Store, model: SnapshotId, storey: int) -> None:
    """BadInput says why the storey of that number cannot be taken away; reads the manifest and small files only."""
    if EXPANSION_FILE not in store.manifest(model).files:
        told = "has no storeys: it is a base, or they were averaged into one"
        raise BadInput(f"storey {storey}: model {model[:12]} {told}")
    expansion = read_expansion(store, model)
    if not 1 <= storey <= len(expansion.storeys):
        raise BadInput(f"storey {storey}: model {model[:12]} has storeys 1 to {len(expansion.storeys)}")
    family, files = family_of(model_config(store, model)), weight_files(store.manifest(model))
    removed = expansion.storeys[storey - 1]
    if removed.has_trained_base:
        raise BadInput(
            f"storey {storey} cannot be removed: its training changed tensors below it (a base learning rate above 0); "
            "roll back to the version before it instead"
        )
    if removed.is_averaged_over:
        raise BadInput(
            f"storey {storey} cannot be removed: a later storey was averaged into this model; roll back to a version "
            "before that instead"
        )
    gone = {b.index for b in removed.new_blocks}
    digests = {n: d for f in files.values() for n, d in f.tensors.items()}
    entries = {e.name: e for f in files.values() for e in f.entries()}
    constants = Constants(store)
    for number, above in enumerate(expansion.storeys[storey:], start=storey + 1):
        if not _is_silent(family, above, digests, entries, constants):
            raise BadInput(
                f"storey {storey} cannot be removed: storey {number} was trained on it; remove storey {number} first"
            )
        present = present_indices(expansion, number)
        copies = [b.index for b in above.new_blocks if present[b.source] in gone]
        if copies:
            raise BadInput(
                f"storey {storey} cannot be removed: block {copies[0]} of storey {number} is a copy of one of its "
                f"blocks; remove storey {number} first"
            )


def _is_silent(
    family: Family,
    storey: Storey,
    digests: Mapping[str, str],
    entries: Mapping[str, TensorEntry],
    constants: Constants,
) -> bool:
    """Every last factor of its blocks still has the value that it was given."""
    for name, digest in digests.items():
        place = family.split(name)
        if place is None or place[0] not in {b.index for b in storey.new_blocks}:
            continue
        value = family.silent_value(place[1])
        if value is not None and constants.of(value, entries[name]) != digest:
            return False
    return True


def present_indices(expansion: Expansion, number: int) -> list[int]:
    """The present index of every block of the model that storey `number` was put on."""
    later = {b.index for s in expansion.storeys[number - 1 :] for b in s.new_blocks}
    return [i for i in range(expansion.depth) if i not in later]


def _remaining(expansion: Expansion, storey: int, kept: list[int]) -> Expansion | None:
    """The other storeys as they then are; None where there is none."""
    moved = {old: new for new, old in enumerate(kept)}
    storeys: list[Storey] = []
    for number, each in enumerate(expansion.storeys, start=1):
        if number == storey:
            continue
        blocks = tuple(NewBlock(moved[b.index], b.source) for b in each.new_blocks)
        if number < storey:
            storeys.append(replace(each, new_blocks=blocks))
            continue
        present = present_indices(expansion, number)
        sources = {source: i for i, source in enumerate(s for s, p in enumerate(present) if p in moved)}
        blocks = tuple(NewBlock(b.index, sources[old.source]) for b, old in zip(blocks, each.new_blocks, strict=True))
        storeys.append(replace(each, depth_before=len(sources), new_blocks=blocks))
    return Expansion(len(kept), tuple(storeys)) if storeys else None


def _without(file: TensorFile, family: Family, kept: list[int]) -> TensorFile:
    """The file with the blocks that stay, under their new names."""
    moved = {old: new for new, old in enumerate(kept)}
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    digests: dict[str, str] = {}
    for entry in file.entries():
        place = family.split(entry.name)
        if place is not None and place[0] not in moved:
            continue
        name = entry.name if place is None else family.block_tensor(moved[place[0]], place[1])
        shapes[name], digests[name] = (entry.dtype, entry.shape), file.tensors[entry.name]
    if digests == dict(file.tensors):
        return file
    text, entries = compose_header(header_metadata(file.header), shapes)
    return TensorFile(text, digests, len(header_prefix(text)) + sum(e.size_bytes for e in entries))
