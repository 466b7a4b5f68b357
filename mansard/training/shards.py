"""Packed rows on disk: what stage `tokenize` writes and stage `train` maps, so that a text may be larger than memory.

A snapshot holds `tokens-00000.bin` and `positions-00000.bin` (little-endian, rows one after the other, at most
SHARD_BYTES each), further pairs, and `shards.json`. Objects of the store are mapped as they lie there, by every rank;
`check_shards` compares them with their digests, once a training.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from mansard.canonical import canonical_json
from mansard.errors import BadInput, Corrupt
from mansard.records import SnapshotId
from mansard.store.snapshot import Blob
from mansard.store.store import Store
from mansard.training.data import Batch, as_batch
from mansard.training.packing import Rows

FACTS_FILE = "shards.json"
FORMAT = 2
SHARD_BYTES = 64 << 20
"""Small enough that several are hashed and sent to a bucket at once."""

Mapped = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Shards:
    """One text in packed rows, mapped. `highest_token` is the largest id in it; `made_with` what decided its rows:
    `seed`, `source` (the order of documents is theirs) and `tokenizer` (a snapshot)."""

    name: str
    made_with: Mapping[str, Any]
    bytes_per_token: float
    row_tokens: int
    rows_per_shard: int
    highest_token: int
    tokens: tuple[Mapped, ...]
    positions: tuple[Mapped, ...]

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.tokens)

    def rows(self, numbers: Sequence[int]) -> tuple[Rows, Rows]:
        return self._taken(self.tokens, numbers), self._taken(self.positions, numbers)

    def batch(self, numbers: Sequence[int]) -> Batch:
        return as_batch(*self.rows(numbers))

    def _taken(self, shards: tuple[Mapped, ...], numbers: Sequence[int]) -> Rows:
        places = (divmod(number, self.rows_per_shard) for number in numbers)
        return numpy.stack([shards[shard][row] for shard, row in places]).astype(numpy.int32)


def open_shards(store: Store, snapshot: SnapshotId, name: str) -> Shards:
    """BadInput where the snapshot is none of stage `tokenize`."""
    facts = json.loads(store.read_file(snapshot, FACTS_FILE))
    if facts["format"] != FORMAT:
        raise BadInput(f"snapshot {snapshot}: shards of format {facts['format']!r}, not {FORMAT}; tokenize again")
    files = store.manifest(snapshot).files

    def mapped(kind: str) -> tuple[Mapped, ...]:
        found = []
        for number in range(facts["shards"]):
            file = files[_file(kind, number)]
            assert isinstance(file, Blob), "no safetensors"
            view = numpy.frombuffer(store.open_object(file.object), facts[f"{kind}_dtype"])
            found.append(view.reshape(-1, facts["row_tokens"]))
        return tuple(found)

    return Shards(
        name,
        facts["made_with"],
        facts["bytes_per_token"],
        facts["row_tokens"],
        facts["rows_per_shard"],
        facts["highest_token"],
        mapped("tokens"),
        mapped("positions"),
    )


def check_shards(store: Store, texts: Mapping[str, SnapshotId]) -> None:
    """Corrupt, naming the text and the file to remove, where a shard is not what was written."""
    for name, snapshot in texts.items():
        if damages := store.verify(snapshot):
            raise Corrupt(f"{name}: {damages[0]}")


def write_shards(
    folder: Path, chunks: Iterable[tuple[Rows, Rows]], row_tokens: int, highest_token: int, facts: Mapping[str, Any]
) -> int:
    """Write rows as they come, and `facts` with what it takes to read them; returns how many rows."""
    dtypes = {"tokens": _dtype(highest_token), "positions": _dtype(row_tokens - 1)}
    rows_per_shard = max(1, SHARD_BYTES // (row_tokens * max(numpy.dtype(d).itemsize for d in dtypes.values())))
    rows = 0
    for tokens_RT, positions_RT in chunks:
        done = 0
        while done < len(tokens_RT):
            number, inside = divmod(rows, rows_per_shard)
            part = slice(done, done + rows_per_shard - inside)
            for kind, found in (("tokens", tokens_RT[part]), ("positions", positions_RT[part])):
                with (folder / _file(kind, number)).open("ab") as file:
                    file.write(found.astype(dtypes[kind]).tobytes())
            done += len(tokens_RT[part])
            rows += len(tokens_RT[part])
    shape = {"row_tokens": row_tokens, "rows": rows, "rows_per_shard": rows_per_shard,
             "shards": -(-rows // rows_per_shard), "highest_token": highest_token}  # fmt: skip
    types = {f"{kind}_dtype": dtype for kind, dtype in dtypes.items()}
    (folder / FACTS_FILE).write_bytes(canonical_json({"format": FORMAT, **shape, **types, **facts}))
    return rows


def _file(kind: str, number: int) -> str:
    return f"{kind}-{number:05}.bin"


def _dtype(highest: int) -> str:
    return "<u2" if highest < 1 << 16 else "<u4"
