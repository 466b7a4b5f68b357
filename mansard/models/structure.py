"""The structural form of the proof: an expansion is its base and blocks that add nothing, shown by digests and zeros.

For models that memory does not hold twice: manifests are compared, and every object is read once, a piece at a time.
Shown: config.json is the base's with its blocks counted anew; every tensor of the base stands in the expansion under
the name that its block has there, with the digest it had; a new block is a copy, its last factors before the residual
hold the value that silences them throughout; every object has the bytes of its digest; every number of the base is
finite.
So a new block adds exactly zero. Not shown: that no intermediate value of a copy overflows where its original's did not
(zero times infinity), and what the libraries compute; the logits form shows both on a probe.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

from mansard.errors import BadInput, Corrupt, StageFailed
from mansard.models.constants import constant_digest
from mansard.models.families import Family, depth_of, family_of
from mansard.models.finite import is_finite
from mansard.models.model_files import model_config, weight_files
from mansard.models.rebuilding import rebuilt_config
from mansard.models.storeys import Storey, read_expansion
from mansard.records import SnapshotId
from mansard.store.safetensors_header import TensorEntry
from mansard.store.store import Store

Told = Callable[[int, int], None]
"""Called with (bytes read, bytes in all)."""


@dataclass(frozen=True, slots=True)
class Structure:
    """How many tensors of the expansion are the base's, copies, and silent."""

    kept: int
    copied: int
    silent: int


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor of a snapshot: the object that holds it, its type and shape."""

    digest: str
    entry: TensorEntry


def prove_structure(store: Store, base: SnapshotId, expansion: SnapshotId, told: Told) -> Structure:
    """StageFailed names the first tensor that is not what an expansion of `base` has; BadInput for NaN or infinity in
    the base, Corrupt for an object unlike its digest."""
    config = model_config(store, base)
    family, storey = family_of(config), read_expansion(store, expansion).storeys[-1]
    if storey.depth_before != depth_of(config):
        raise StageFailed(f"the expansion stands on {storey.depth_before} blocks, its base has {depth_of(config)}")
    sources = sources_of(storey)
    if model_config(store, expansion) != rebuilt_config(family, config, sources):
        raise StageFailed("the expansion's config.json is not its base's with the blocks counted anew")
    old, made = held_tensors(store, base), held_tensors(store, expansion)
    new = frozenset(b.index for b in storey.new_blocks)
    structure = compare_tensors(family, sources, new, old, made)
    damages = store.verify(expansion, told)
    if damages:
        raise Corrupt(str(damages[0]))
    check_finite(store, old)
    return structure


def compare_tensors(
    family: Family, sources: Sequence[int], new: Set[int], old: Mapping[str, Held], made: Mapping[str, Held]
) -> Structure:
    """StageFailed unless `made` is `old` with its blocks renamed and silent copies in the places `new`. Pure."""
    wanted: dict[str, str] = {}
    silent: set[str] = set()
    inside: dict[int, list[tuple[str, str]]] = {}
    for name in old:
        place = family.split(name)
        if place is None:
            wanted[name] = name
        else:
            inside.setdefault(place[0], []).append((name, place[1]))
    for block, source in enumerate(sources):
        for name, name_in_block in inside.get(source, []):
            here = family.block_tensor(block, name_in_block)
            wanted[here] = name
            if block in new and family.silent_value(name_in_block) is not None:
                silent.add(here)
    if different := wanted.keys() ^ made.keys():
        raise StageFailed(f"the expansion is not its base: tensor {min(different)!r} is missing or left over")
    for name, source_name in sorted(wanted.items()):
        _compare(family, name, old[source_name], made[name], name in silent)
    copied = sum((p := family.split(n)) is not None and p[0] in new for n in made) - len(silent)
    return Structure(len(made) - copied - len(silent), copied, len(silent))


def _compare(family: Family, name: str, source: Held, made: Held, is_silent: bool) -> None:
    kind = (source.entry.dtype, source.entry.shape)
    place = family.split(name)
    value = family.silent_value(place[1]) if is_silent and place is not None else None
    expected = source.digest if value is None else constant_digest(value, source.entry)
    if kind != (made.entry.dtype, made.entry.shape) or made.digest != expected:
        what = "its base's" if value is None else f"{value:g} throughout"
        raise StageFailed(f"the expansion is not its base: tensor {name!r} is not {what}")


def sources_of(storey: Storey) -> tuple[int, ...]:
    """The base's block that each block of the expansion is or copies; StageFailed where the record is no such thing."""
    copies = {b.index: b.source for b in storey.new_blocks}
    depth = storey.depth_before + len(copies)
    kept = iter(range(storey.depth_before))
    if len(copies) != len(storey.new_blocks) or any(not 0 <= i < depth for i in copies):
        raise StageFailed(f"new blocks at {sorted(copies)} are recorded, which are no places in {depth} blocks")
    return tuple(copies[i] if i in copies else next(kept) for i in range(depth))


def held_tensors(store: Store, model: SnapshotId) -> dict[str, Held]:
    """Every tensor of a model by its name."""
    files = weight_files(store.manifest(model))
    return {e.name: Held(f.tensors[e.name], e) for p, f in files.items() for e in f.entries(p)}


def check_finite(store: Store, tensors: Mapping[str, Held]) -> None:
    """BadInput, naming the first, where a tensor holds NaN or infinity. Reads every tensor once."""
    broken = [name for name, held in sorted(tensors.items()) if not is_finite(store, held.digest, held.entry)]
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise BadInput(f"the base's tensor {broken[0]!r}{more} holds NaN or infinity; finite numbers are expected")
