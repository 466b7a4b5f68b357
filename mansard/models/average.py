"""Fusion `average`: the newest storey averaged into the blocks that it copied, at the depth below it.

(1 - weight) * source + weight * new, tensor by tensor, in float32 (float64 for float64), rounded to the checkpoint's
type. The base's tensors change, so nothing of the result is frozen, and what the storey had learned is kept in part
only: its last factors start at zero and stay small, and an average with them makes those of its sources smaller (stage
`kept-gain` measures what that does). One tensor is in memory at a time.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from mansard.errors import BadInput
from mansard.models.families import family_of
from mansard.models.model_files import model_config, weight_files
from mansard.models.remove_storey import present_indices, without_storey
from mansard.models.storeys import EXPANSION_FILE, Expansion, read_expansion
from mansard.records import SnapshotId
from mansard.store.safetensors_header import TensorEntry
from mansard.store.snapshot import Blob, Manifest, TensorFile
from mansard.store.store import Store

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def average(
    store: Store, model: SnapshotId, weight: float, told: Callable[[int, int], None] = lambda done, total: None
) -> SnapshotId:
    """The model, its newest storey averaged away; `told` hears tensors done and their number. BadInput for a model
    without storeys. Storeys that stay are marked: none of them can be taken away any more."""
    if EXPANSION_FILE not in store.manifest(model).files:
        raise BadInput(f"model {model[:12]} has no storeys: there is nothing to average into it")
    expansion = read_expansion(store, model)
    rest = without_storey(store, model, len(expansion.storeys))
    made = {}
    pairs = averaged_pairs(store, model)
    held = {name: digest for f in weight_files(store.manifest(model)).values() for name, digest in f.tensors.items()}
    entries = {e.name: e for path, file in weight_files(rest).items() for e in file.entries(path)}
    for done, (name, (source, new)) in enumerate(pairs.items()):
        told(done, len(pairs))
        made[name] = _mean(store, held[source], held[new], entries[name], weight)
    files: dict[str, Blob | TensorFile] = {**rest.files, **_replaced(rest, made)}
    below = files.get(EXPANSION_FILE)
    if isinstance(below, Blob):
        marked = _averaged_over(bytes(store.open_object(below.object))).to_bytes()
        files[EXPANSION_FILE] = Blob(store.put_bytes(marked), len(marked))
    return store.put_manifest(Manifest(files))


def averaged_pairs(store: Store, model: SnapshotId) -> dict[str, tuple[str, str]]:
    """Name in the averaged model -> (source's, new block's) names in `model`; every tensor of every new block."""
    expansion, family = read_expansion(store, model), family_of(model_config(store, model))
    present = present_indices(expansion, len(expansion.storeys))
    sources = {block.index: block.source for block in expansion.new_blocks}
    pairs = {}
    for file in weight_files(store.manifest(model)).values():
        for new in file.tensors:
            block, name = family.split(new) or (-1, "")
            if block in sources:
                source = sources[block]
                pairs[family.block_tensor(source, name)] = (family.block_tensor(present[source], name), new)
    return dict(sorted(pairs.items()))


def _mean(store: Store, source: str, new: str, like: TensorEntry, weight: float) -> str:
    """The digest of the average of two objects of the type of `like`."""
    dtype = DTYPES[like.dtype]
    computed = torch.promote_types(dtype, torch.float32)
    one, other = (torch.frombuffer(bytearray(store.open_object(d)), dtype=dtype).to(computed) for d in (source, new))
    mean = ((1.0 - weight) * one + weight * other).to(dtype)
    return store.put_bytes(memoryview(mean.view(torch.uint8).numpy()))


def _replaced(rest: Manifest, made: Mapping[str, str]) -> dict[str, TensorFile]:
    return {
        path: TensorFile(file.header, {n: made.get(n, d) for n, d in file.tensors.items()}, file.size_bytes)
        for path, file in weight_files(rest).items()
    }


def _averaged_over(record: bytes) -> Expansion:
    expansion = Expansion.from_bytes(record, EXPANSION_FILE)
    return replace(expansion, storeys=tuple(replace(s, is_averaged_over=True) for s in expansion.storeys))

