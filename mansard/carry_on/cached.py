"""The cache of states as training reads it: rows put together from sequences, out of the store's objects.

Nothing is copied out of the store: shards are mapped. A shard is compared with its digest the first time it is used.
Legend: B rows, T tokens, N = B * T, D width.
"""

import json
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch

from mansard.carry_on.sequences import Key, segments_of
from mansard.carry_on.wire import Coded, side_by_side
from mansard.digest import digest_bytes
from mansard.errors import BadInput, Corrupt
from mansard.records import SnapshotId
from mansard.store.snapshot import TensorFile
from mansard.store.store import Store
from mansard.training.data import Batch, Packed

CAPTURE_FILE = "capture.json"
_TYPES = {
    "BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64, "I32": torch.int32, "I8": torch.int8,
    "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip


@dataclass(slots=True)
class _Shard:
    tensors: dict[str, torch.Tensor]
    digests: dict[str, str]
    is_checked: bool = False


@dataclass(slots=True)
class CachedStates:
    """Open it with `open_cache`. `places` is key -> (shard, first row, number in the shard)."""

    store: Store
    snapshot: SnapshotId
    facts: dict[str, Any]
    shards: dict[str, _Shard] = field(default_factory=dict)
    places: dict[Key, tuple[str, int, int]] = field(default_factory=dict)

    @property
    def width(self) -> int:
        return int(self.facts["width"])

    @property
    def taps(self) -> tuple[int, ...]:
        """The layers whose states follow the final one's in a token's row."""
        return tuple(self.facts.get("taps", ()))

    def of(self, batch: Batch) -> tuple[Coded, list[int]]:
        """The states of a batch's rows, coded [N, D] as they are kept, and the rows that `first_SD` replaces.

        BadInput for a sequence that was not captured; Corrupt for a shard that is not what was written.
        """
        parts: list[tuple[_Shard, int, int, int]] = []
        first_rows, row = [], 0
        for tokens, positions in zip(batch.tokens_BT.numpy(), batch.positions_BT.numpy(), strict=True):
            for sequence in segments_of(tokens.astype("int32"), positions):
                name, start, number = self._place(sequence.key)
                parts.append((self._checked(name), start, len(sequence.tokens), number))
                first_rows.append(row)
                row += len(sequence.tokens)
        dtype = parts[0][0].tensors["states"].dtype
        states_ND = torch.cat([_rows(s.tensors["states"], a, n) for s, a, n, _ in parts]).view(dtype)
        if "scales" not in parts[0][0].tensors:
            return Coded(states_ND), first_rows
        scales_N = torch.cat([s.tensors["scales"][a : a + n] for s, a, n, _ in parts])
        first_SD = torch.stack([s.tensors["first"][number] for s, _, _, number in parts])
        return Coded(states_ND, scales_N, first_SD, self._widths), first_rows

    def texts(self, part: str) -> list[Packed]:
        """The packed rows of every source's `train` or `held_out` text, as they were captured."""
        return [_packed(self.store, self.snapshot, name, part, facts) for name, facts in self.facts["sources"].items()]

    @property
    def _widths(self) -> tuple[int, ...]:
        return (self.width,) * (1 + len(self.taps)) if self.taps else ()

    def _place(self, key: Key) -> tuple[str, int, int]:
        try:
            return self.places[key]
        except KeyError:
            raise BadInput(
                f"capture {self.snapshot[:12]}: a sequence of the batch was not captured; capture with the same data"
            ) from None

    def _checked(self, name: str) -> _Shard:
        shard = self.shards[name]
        if not shard.is_checked:
            for tensor, digest in shard.digests.items():
                if digest_bytes(self.store.open_object(digest)) != digest:
                    raise Corrupt(
                        f"capture {self.snapshot[:12]}: {name}: {tensor} does not match its digest; "
                        "run the same command again: what is damaged is fetched again"
                    )
            shard.is_checked = True
        return shard


@dataclass(frozen=True, slots=True)
class AlignedStates:
    """The caches of several bases on the same text: a token's states side by side, the first base's first."""

    caches: tuple[CachedStates, ...]

    def of(self, batch: Batch) -> tuple[Coded, list[int]]:
        """As CachedStates.of; BadInput where a base lacks a sequence or keeps its states otherwise."""
        found = [cache.of(batch) for cache in self.caches]
        return side_by_side([coded for coded, _ in found]), found[0][1]


def open_cache(store: Store, snapshot: SnapshotId) -> CachedStates:
    """The cache in a snapshot of stage `capture`."""
    facts = json.loads(store.read_file(snapshot, CAPTURE_FILE))
    cache = CachedStates(store, snapshot, facts)
    for name, file in sorted(store.manifest(snapshot).files.items()):
        if name.startswith("shard-") and isinstance(file, TensorFile):
            shard = _Shard(_tensors(store, file), dict(file.tensors))
            cache.shards[name] = shard
            start = 0
            for number, length in enumerate(shard.tensors["lengths"].tolist()):
                key = bytes(shard.tensors["keys"][number].tolist())
                cache.places[key] = (name, start, number)
                start += length
    return cache


def _tensors(store: Store, file: TensorFile) -> dict[str, torch.Tensor]:
    found = {}
    for entry in file.entries():
        data = store.open_object(file.tensors[entry.name])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")  # it is only read
            flat = torch.frombuffer(data, dtype=torch.uint8)
        found[entry.name] = flat.view(_TYPES[entry.dtype]).view(*entry.shape)
    return found


def _rows(states_ND: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """As bytes where torch cannot join the type."""
    rows = states_ND[start : start + count]
    return rows.view(torch.uint8) if rows.dtype == torch.float8_e4m3fn else rows


def _packed(store: Store, snapshot: SnapshotId, name: str, part: str, facts: dict[str, Any]) -> Packed:
    file = store.manifest(snapshot).files[f"rows/{name}.{part}.safetensors"]
    assert isinstance(file, TensorFile), "the capture wrote it as tensors"
    tensors = _tensors(store, file)
    return Packed(name, tensors["tokens"].numpy(), tensors["positions"].numpy(), facts[part]["bytes_per_token"])
