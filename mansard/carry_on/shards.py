"""States on disk: shards of whole sequences, each a safetensors file with its digest beside it.

A shard whose digest does not match (truncated, a bit flipped, half written) counts as absent and is fetched again.
Which sequences a shard holds is fixed by the list of all of them, so a run that was killed goes on with the shards that
are whole. Legend: N tokens, D width, S sequences.
"""

import json
import math
import os
import shutil
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from mansard.canonical import canonical_json, replaced_atomically, write_atomically
from mansard.carry_on.sequences import TokenSequence
from mansard.carry_on.wire import Coded, Scheme, bytes_per_token
from mansard.errors import BadInput

SHARD_TOKENS = 65_536
"""At width 5,120 in bf16 a shard has 0.67 GB: small beside a disk, large beside a file's overhead."""
DISK_MARGIN = 1.05
SYNCED_BYTES = 1 << 26
"""What a disk is given at a time, so that the last of a shard is on it soon after it has come."""
_KINDS = {torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8"}
_BYTES = {"I64": 8, "F32": 4, "BF16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1}


@dataclass(frozen=True, slots=True)
class Shard:
    """One file's name and its sequences."""

    name: str
    sequences: tuple[TokenSequence, ...]

    @property
    def tokens(self) -> int:
        return sum(len(s.tokens) for s in self.sequences)

    def is_whole(self, folder: Path) -> bool:
        """Whether the file is there with the digest that was noted when it was written."""
        try:
            noted = json.loads((folder / f"{self.name}.json").read_bytes())
            data = (folder / self.name).read_bytes()
        except (OSError, ValueError):
            return False
        return bool(noted["digest"] == blake3(data).hexdigest())


def plan_shards(sequences: Sequence[TokenSequence], shard_tokens: int = SHARD_TOKENS) -> list[Shard]:
    """Runs of sequences of about `shard_tokens` tokens, in order."""
    shards: list[Shard] = []
    held: list[TokenSequence] = []
    tokens = 0
    for sequence in sequences:
        held.append(sequence)
        tokens += len(sequence.tokens)
        if tokens >= shard_tokens:
            shards.append(Shard(f"shard-{len(shards):05d}.safetensors", tuple(held)))
            held, tokens = [], 0
    if held:
        shards.append(Shard(f"shard-{len(shards):05d}.safetensors", tuple(held)))
    return shards


def expected_bytes(shards: Sequence[Shard], scheme: Scheme, width: int, states: int = 1) -> int:
    """What the whole cache takes, with so many `states` of `width` a token."""
    tokens = sum(shard.tokens for shard in shards)
    count = sum(len(shard.sequences) for shard in shards)
    return round(tokens * bytes_per_token(scheme, width * states, tokens / max(count, 1), states))


def check_room(expected: int, folder: Path, room: int | None = None) -> None:
    """BadInput where the disk of `folder` (or `room` bytes of it) does not hold the cache, twice where the store keeps
    it: once as it is fetched, once as it is kept."""
    free = shutil.disk_usage(folder).free if room is None else room
    needed = round(2 * expected * DISK_MARGIN)
    if needed > free:
        raise BadInput(
            f"the cache of states takes {expected:,} bytes ({needed:,} while it is taken), {folder} has {free:,} free; "
            "make capture.tokens smaller, take capture.scheme fp8 or int8, or give the store a larger disk"
        )


def write_shard(folder: Path, shard: Shard, coded: Iterable[Coded], scheme: Scheme) -> None:
    """Write the shard and its digest while its sequences come, in order. ValueError where there are fewer or more."""
    coming = iter(coded)
    first = next(coming)
    digest, behind = blake3(), 0
    scales, firsts = [], []
    with replaced_atomically(folder / shard.name) as file:

        def put(tensor: torch.Tensor) -> None:
            data = memoryview(tensor.contiguous().view(torch.uint8).numpy())
            file.write(data)
            digest.update(data)

        head = _header(shard, first, scheme)
        file.write(head)
        digest.update(head)
        put(torch.tensor([len(s.tokens) for s in shard.sequences], dtype=torch.int64))
        for sequence, part in zip(shard.sequences, chain([first], coming), strict=True):
            assert len(part.states_ND) == len(sequence.tokens), "a state for every token"
            if (part.states_ND.shape[1:], part.states_ND.dtype) != (first.states_ND.shape[1:], first.states_ND.dtype):
                raise BadInput(f"a node's states became {part.states_ND.shape[1]} wide, they were "
                               f"{first.states_ND.shape[1]}; ask one base")  # fmt: skip
            put(part.states_ND)
            scales += [] if part.scales_N is None else [part.scales_N]
            firsts += [] if part.first_SD is None else [part.first_SD]
            behind += part.states_ND.nbytes
            if behind > SYNCED_BYTES:  # so that little is left for the end
                os.fdatasync(file.fileno())
                behind = 0
        for tensor in scales + firsts:
            put(tensor)
        put(torch.frombuffer(bytearray(b"".join(s.key for s in shard.sequences)), dtype=torch.uint8))
    note = {"format": 1, "digest": digest.hexdigest(), "tokens": shard.tokens}
    write_atomically(folder / f"{shard.name}.json", canonical_json(note))


def _header(shard: Shard, like: Coded, scheme: Scheme) -> bytes:
    """A safetensors file's beginning: its tensors' types, shapes and places, in the order in which they are written;
    `like` is one of the shard's sequences."""
    count, tokens = len(shard.sequences), shard.tokens
    width, kind = like.states_ND.shape[1], _KINDS[like.states_ND.dtype]
    tensors: list[tuple[str, str, list[int]]] = [("lengths", "I64", [count]), ("states", kind, [tokens, width])]
    if like.scales_N is not None and like.first_SD is not None:
        tensors.append(("scales", "F32", [tokens, *like.scales_N.shape[1:]]))
        tensors.append(("first", "BF16", [count, width]))
    tensors.append(("keys", "U8", [count, len(shard.sequences[0].key)]))
    entries: dict[str, Any] = {"__metadata__": {"scheme": scheme}}
    end = 0
    for name, dtype, size in tensors:
        begin, end = end, end + math.prod(size) * _BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": size, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
