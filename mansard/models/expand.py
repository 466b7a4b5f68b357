"""Expansion: Pro blocks inserted into a model's manifest. No tensor is read, only headers and small files.

`plan` is pure; `apply` renames the base's tensors, repeats the digests of the copied blocks, puts the family's silent
values where its blocks reach the residual stream, and writes config.json, the index and `mansard_expansion.json`. That
the result computes the base's function is proved by a stage of its own (`prove`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mansard.errors import BadInput
from mansard.models.checkpoint import check_once, check_tensors
from mansard.models.constants import Constants
from mansard.models.families import Config, Family, depth_of, family_of
from mansard.models.model_files import model_config, pretty_json, rebuilt_index, weight_files
from mansard.models.placement import copied_blocks
from mansard.models.rebuilding import rebuilt_config
from mansard.models.storeys import EXPANSION_FILE, Expansion, NewBlock, Storey, read_expansion
from mansard.records import SnapshotId
from mansard.specs.surgery import Expand
from mansard.store.safetensors_header import compose_header, header_metadata, header_prefix
from mansard.store.snapshot import (
    CONFIG_FILE,
    INDEX_FILE,
    Blob,
    Manifest,
    TensorFile,
    check_weight_files,
    read_json_object,
)
from mansard.store.store import Store


@dataclass(frozen=True, slots=True)
class ExpansionPlan:
    """What goes where. `sources[i]` is the base's block that block i of the expansion is, or copies."""

    family: Family
    depth_before: int
    sources: tuple[int, ...]
    new_blocks: tuple[NewBlock, ...]

    @property
    def depth(self) -> int:
        return len(self.sources)

    @property
    def renames(self) -> tuple[int, ...]:
        """The index in the expansion of every block of the base."""
        new = {b.index for b in self.new_blocks}
        return tuple(i for i in range(self.depth) if i not in new)


def plan(config: Config, expand: Expand, gains: Sequence[float] | None = None) -> ExpansionPlan:
    """Where the new blocks go, each right after the block that it copies; BadInput for a family that is not supported
    or positions that the model does not have (`placement.copied_blocks`, which reads `gains`)."""
    family, depth = family_of(config), depth_of(config)
    copied = copied_blocks(expand, depth, gains)
    sources: list[int] = []
    new_blocks: list[NewBlock] = []
    for block in range(depth):
        sources.append(block)
        if block in copied:
            new_blocks.append(NewBlock(len(sources), block))
            sources.append(block)
    return ExpansionPlan(family, depth, tuple(sources), tuple(new_blocks))


def apply(store: Store, base: SnapshotId, plan: ExpansionPlan) -> SnapshotId:
    """The expanded model; BadInput where the checkpoint and its config.json disagree."""
    manifest = store.manifest(base)
    config = model_config(store, base)
    assert depth_of(config) == plan.depth_before, "the plan is of another model"
    index = store.read_file(base, INDEX_FILE) if INDEX_FILE in manifest.files else None
    weights = weight_files(manifest)
    entries = {path: file.entries(path) for path, file in weights.items()}
    check_once(entries)
    check_weight_files({p: list(f.tensors) for p, f in weights.items()}, index, f"snapshot {base}")
    check_tensors(plan.family, config, {e.name: e for found in entries.values() for e in found})
    constants = Constants(store)
    expanded = {path: _expand_file(file, plan, constants) for path, file in weights.items()}
    small = {
        CONFIG_FILE: pretty_json(rebuilt_config(plan.family, config, plan.sources)),
        EXPANSION_FILE: _expansion(store, base, manifest, plan).to_bytes(),
    }
    if index is not None:
        small[INDEX_FILE] = pretty_json(rebuilt_index(read_json_object(index, INDEX_FILE), expanded))
    blobs = {path: Blob(store.put_bytes(data), len(data)) for path, data in small.items()}
    return store.put_manifest(Manifest({**manifest.files, **expanded, **blobs}))


def _expand_file(file: TensorFile, plan: ExpansionPlan, constants: Constants) -> TensorFile:
    """The file with its blocks renamed and the copies of its blocks' tensors beside their sources."""
    copies = {b.source: b.index for b in plan.new_blocks}
    renames = plan.renames
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    digests: dict[str, str] = {}
    for entry in file.entries():
        place = plan.family.split(entry.name)
        digest = file.tensors[entry.name]
        if place is None:
            shapes[entry.name], digests[entry.name] = (entry.dtype, entry.shape), digest
            continue
        block, name = place
        moved = plan.family.block_tensor(renames[block], name)
        shapes[moved], digests[moved] = (entry.dtype, entry.shape), digest
        if block in copies:
            copy = plan.family.block_tensor(copies[block], name)
            value = plan.family.silent_value(name)
            shapes[copy] = (entry.dtype, entry.shape)
            digests[copy] = digest if value is None else constants.of(value, entry)
    if digests == dict(file.tensors):
        return file
    text, entries = compose_header(header_metadata(file.header), shapes)
    return TensorFile(text, digests, len(header_prefix(text)) + sum(e.size_bytes for e in entries))


def _expansion(store: Store, base: SnapshotId, manifest: Manifest, plan: ExpansionPlan) -> Expansion:
    """The new storey upon those of the base, whose indices move with its blocks."""
    below: tuple[Storey, ...] = ()
    if EXPANSION_FILE in manifest.files:
        earlier = read_expansion(store, base)
        if earlier.depth != plan.depth_before:
            raise BadInput(
                f"snapshot {base}: {EXPANSION_FILE} tells of {earlier.depth} blocks, {CONFIG_FILE} of "
                f"{plan.depth_before}; remove {EXPANSION_FILE} where the model was changed by hand"
            )
        below = tuple(
            replace(s, new_blocks=tuple(NewBlock(plan.renames[b.index], b.source) for b in s.new_blocks))
            for s in earlier.storeys
        )
    return Expansion(plan.depth, (*below, Storey(plan.depth_before, plan.new_blocks)))
