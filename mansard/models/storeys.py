"""The storeys of a model: `mansard_expansion.json`, which expansion and fusion write and loaders never look at."""

from dataclasses import asdict, dataclass
from typing import Any

from mansard.canonical import canonical_json
from mansard.digest import digest_json
from mansard.errors import BadInput
from mansard.models.families import family_of
from mansard.models.model_files import model_config, weight_files
from mansard.records import SnapshotId
from mansard.store.snapshot import read_json_object
from mansard.store.store import Store

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
    has_trained_base: bool = False
    """Its training changed tensors below it too (a base learning rate above 0). Fusion says so."""
    is_averaged_over: bool = False
    """A later storey was averaged into the model that it is part of."""

    def to_json(self) -> dict[str, Any]:
        """What stands in the file; what is not so is left out where older files do not name it."""
        told = asdict(self)
        if not self.is_averaged_over:
            del told["is_averaged_over"]
        return told


@dataclass(frozen=True, slots=True)
class Expansion:
    """`mansard_expansion.json`: the storeys of a model, oldest first. The newest one is what an upgrade trains."""

    depth: int
    storeys: tuple[Storey, ...]

    @property
    def new_blocks(self) -> tuple[NewBlock, ...]:
        return self.storeys[-1].new_blocks

    def to_bytes(self) -> bytes:
        storeys = [storey.to_json() for storey in self.storeys]
        new_blocks = [asdict(b) for b in self.new_blocks]
        return canonical_json({"format": 1, "depth": self.depth, "storeys": storeys, "new_blocks": new_blocks})

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
                    s.get("has_trained_base", False) is True,
                    s.get("is_averaged_over", False) is True,
                )
                for s in tree["storeys"]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"{where}: not what an expansion writes ({error!r:.80}); remove it") from error
        if not storeys:
            raise BadInput(f"{where}: no storeys in it; remove it")
        return Expansion(depth, storeys)


def read_expansion(store: Store, model: SnapshotId) -> Expansion:
    """The storeys of a model; BadInput where it has none."""
    return Expansion.from_bytes(store.read_file(model, EXPANSION_FILE), f"snapshot {model}: {EXPANSION_FILE}")


def newest_tensors(store: Store, model: SnapshotId) -> tuple[str, ...]:
    """The checkpoint's names of every tensor of the newest storey; BadInput where the model has none."""
    config = model_config(store, model)
    family = family_of(config)
    blocks = [b.index for b in read_expansion(store, model).new_blocks]
    return tuple(family.block_tensor(b, n) for b in blocks for n in family.block_tensors(config, b))


def told_storeys(store: Store, model: SnapshotId) -> list[dict[str, Any]]:
    """What a person is told of a model's storeys, oldest first; none for a base. `tensors` is the digest of their
    tensors' digests: two models with the same one share the storey, wherever its blocks stand."""
    manifest = store.manifest(model)
    if EXPANSION_FILE not in manifest.files:
        return []
    expansion, family = read_expansion(store, model), family_of(model_config(store, model))
    held: dict[int, list[list[str]]] = {}
    for file in weight_files(manifest).values():
        for name, digest in file.tensors.items():
            place = family.split(name)
            if place is not None:
                held.setdefault(place[0], []).append([place[1], digest])
    return [
        {
            "storey": number,
            "blocks": [b.index for b in storey.new_blocks],
            "copies_of": [b.source for b in storey.new_blocks],
            "has_trained_base": storey.has_trained_base,
            "is_averaged_over": storey.is_averaged_over,
            "tensors": digest_json([sorted(held.get(b.index, [])) for b in storey.new_blocks]),
        }
        for number, storey in enumerate(expansion.storeys, start=1)
    ]


def _count(value: object, below: int = 1 << 31) -> int:
    if type(value) is not int or not 0 <= value < below:
        raise ValueError(f"{value!r} is no number from 0 to {below - 1}")
    return value
