"""Expansion: Pro blocks inserted into a model's manifest. No tensor is read, only headers and small files.

`plan` is pure; `apply` renames the base's tensors, repeats the digests of the copied blocks, puts zeros where the
family's blocks reach the residual stream, and writes config.json, the index and `mansard_expansion.json`. That the
result computes the base's function is proved by a stage of its own (`prove`).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mansard.canonical import canonical_json
from mansard.errors import BadInput
from mansard.models.families import Config, Family, check_tensor_names, depth_of, family_of, rebuilt_config
from mansard.records import SnapshotId
from mansard.safetensors_header import compose_header, header_metadata, header_prefix
from mansard.snapshot import CONFIG_FILE, INDEX_FILE, Blob, Manifest, TensorFile, check_weight_files, read_json_object
from mansard.specs import Expand
from mansard.store import Store

EXPANSION_FILE = "mansard_expansion.json"


@dataclass(frozen=True, slots=True)
class NewBlock:
    """A Pro block: its index in the expansion and the index, in the base, of the block it copies."""

    index: int
    source: int


@dataclass(frozen=True, slots=True)
class Storey:
    """The Pro blocks of one upgrade, on a base of `depth_before` blocks. Each `index` is the present model's."""

    depth_before: int
    new_blocks: tuple[NewBlock, ...]


@dataclass(frozen=True, slots=True)
class Expansion:
    """`mansard_expansion.json`: the storeys of a model, oldest first. The newest one is what an upgrade trains."""

    depth: int
    storeys: tuple[Storey, ...]

    @property
    def new_blocks(self) -> tuple[NewBlock, ...]:
        return self.storeys[-1].new_blocks

    def to_bytes(self) -> bytes:
        new_blocks = [asdict(b) for b in self.new_blocks]
        return canonical_json({"format": 1, **asdict(self), "new_blocks": new_blocks})

    @staticmethod
    def from_bytes(data: bytes, where: str) -> "Expansion":
        tree = read_json_object(data, where)
        if tree.get("format") != 1:
            raise BadInput(f"{where}: format {tree.get('format')!r}; this Mansard reads format 1: use a newer one")
        try:
            depth = _count(tree["depth"])
            storeys = tuple(
                Storey(
                    _count(s["depth_before"]),
                    tuple(NewBlock(_count(b["index"], depth), _count(b["source"])) for b in s["new_blocks"]),
                )
                for s in tree["storeys"]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"{where}: not what an expansion writes ({error!r:.80}); remove it") from error
        if not storeys:
            raise BadInput(f"{where}: no storeys in it; remove it")
        return Expansion(depth, storeys)


@dataclass(frozen=True, slots=True)
class ExpansionPlan:
    """What goes where. `sources[i]` is the base's block that block i of the expansion is, or copies."""

    family: Family
    depth_before: int
    sources: tuple[int, ...]
    new_blocks: tuple[NewBlock, ...]
    zeroed: tuple[str, ...]

    @property
    def depth(self) -> int:
        return len(self.sources)

    @property
    def renames(self) -> tuple[int, ...]:
        """The index in the expansion of every block of the base."""
        new = {b.index for b in self.new_blocks}
        return tuple(i for i in range(self.depth) if i not in new)


def plan(config: Config, expand: Expand) -> ExpansionPlan:
    """Where the new blocks go; BadInput for a family that is not supported or positions that the model does not have.

    A copy of block p stands right after block p. `even`: copy j of k (from 1) of a model of n blocks stands after block
    ceil(j n / k) - 1 (0-based), the end of the j-th of k groups whose sizes differ by one at most; the last copy is the
    last block. For k that divides n these are the positions of LLaMA Pro (arXiv 2401.02415).
    """
    family, depth = family_of(config), depth_of(config)
    if expand.positions == "even":
        if expand.blocks > depth:
            raise BadInput(f"expand.blocks: {expand.blocks} in a model of {depth} blocks; 1 to {depth} can be even")
        copied = {-(-j * depth // expand.blocks) - 1 for j in range(1, expand.blocks + 1)}
    else:
        copied = set(expand.positions)
        if len(copied) != expand.blocks or len(expand.positions) != expand.blocks:
            raise BadInput(f"expand.positions: {expand.positions}; {expand.blocks} different blocks are expected")
        outside = sorted(p for p in copied if not 0 <= p < depth)
        if outside:
            raise BadInput(
                f"expand.positions: {outside[0]} in a model of {depth} blocks; 0 to {depth - 1} are its blocks"
            )
    sources: list[int] = []
    new_blocks: list[NewBlock] = []
    for block in range(depth):
        sources.append(block)
        if block in copied:
            new_blocks.append(NewBlock(len(sources), block))
            sources.append(block)
    return ExpansionPlan(family, depth, tuple(sources), tuple(new_blocks), family.zeroed(config))


def apply(store: Store, base: SnapshotId, plan: ExpansionPlan) -> SnapshotId:
    """The expanded model; BadInput where the checkpoint and its config.json disagree."""
    manifest = store.manifest(base)
    config = model_config(store, base)
    assert depth_of(config) == plan.depth_before, "the plan is of another model"
    index = store.read_file(base, INDEX_FILE) if INDEX_FILE in manifest.files else None
    weights = _weight_files(manifest)
    check_weight_files({p: list(f.tensors) for p, f in weights.items()}, index, f"snapshot {base}")
    check_tensor_names(plan.family, config, [name for file in weights.values() for name in file.tensors])
    zeros = _Zeros(store)
    expanded = {path: _expand_file(file, plan, zeros) for path, file in weights.items()}
    small = {
        CONFIG_FILE: _pretty(rebuilt_config(plan.family, config, plan.sources)),
        EXPANSION_FILE: _expansion(store, base, manifest, plan).to_bytes(),
    }
    if index is not None:
        small[INDEX_FILE] = _pretty(_rebuilt_index(read_json_object(index, INDEX_FILE), expanded))
    blobs = {path: Blob(store.put_bytes(data), len(data)) for path, data in small.items()}
    return store.put_manifest(Manifest({**manifest.files, **expanded, **blobs}))


def model_config(store: Store, model: SnapshotId) -> dict[str, Any]:
    """config.json of a snapshot."""
    return read_json_object(store.read_file(model, CONFIG_FILE), f"snapshot {model}: {CONFIG_FILE}")


def read_expansion(store: Store, model: SnapshotId) -> Expansion:
    """The storeys of a model; BadInput where it has none."""
    return Expansion.from_bytes(store.read_file(model, EXPANSION_FILE), f"snapshot {model}: {EXPANSION_FILE}")


class _Zeros:
    """Objects of zeros by size; a plan needs few sizes many times."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._digests: dict[int, str] = {}

    def of(self, size_bytes: int) -> str:
        if size_bytes not in self._digests:
            self._digests[size_bytes] = self._store.put_zeros(size_bytes)
        return self._digests[size_bytes]


def _weight_files(manifest: Manifest) -> dict[str, TensorFile]:
    return {p: f for p, f in manifest.files.items() if isinstance(f, TensorFile) and "/" not in p}


def _expand_file(file: TensorFile, plan: ExpansionPlan, zeros: _Zeros) -> TensorFile:
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
            shapes[copy] = (entry.dtype, entry.shape)
            digests[copy] = zeros.of(entry.size_bytes) if name in plan.zeroed else digest
    if digests == dict(file.tensors):
        return file
    text, entries = compose_header(header_metadata(file.header), shapes)
    return TensorFile(text, digests, len(header_prefix(text)) + sum(e.size_bytes for e in entries))


def _rebuilt_index(index: dict[str, Any], files: Mapping[str, TensorFile]) -> dict[str, Any]:
    """The index with every tensor's file, and the totals where the old one has them."""
    entries = {path: file.entries() for path, file in files.items()}
    metadata = index.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise BadInput(f"{INDEX_FILE}: metadata: {metadata!r:.80}; a mapping is expected")
    metadata = dict(metadata)
    every = [e for found in entries.values() for e in found]
    if "total_size" in metadata:
        metadata["total_size"] = sum(e.size_bytes for e in every)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(math.prod(e.shape) for e in every)
    names = {e.name: path for path, found in entries.items() for e in found}
    return {**index, "metadata": metadata, "weight_map": dict(sorted(names.items()))}


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
            Storey(s.depth_before, tuple(NewBlock(plan.renames[b.index], b.source) for b in s.new_blocks))
            for s in earlier.storeys
        )
    return Expansion(plan.depth, (*below, Storey(plan.depth_before, plan.new_blocks)))


def _count(value: object, below: int = 1 << 31) -> int:
    if type(value) is not int or not 0 <= value < below:
        raise ValueError(f"{value!r} is no number from 0 to {below - 1}")
    return value


def _pretty(tree: dict[str, Any]) -> bytes:
    """JSON as transformers writes it, in the order of the keys that were there."""
    return (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode()
