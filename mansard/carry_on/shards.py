"""States on disk: shards of whole sequences, each a safetensors file with its digest beside it.

A shard whose digest does not match (truncated, a bit flipped, half written) counts as absent and is fetched again.
Which sequences a shard holds is fixed by the list of all of them, so a run that was killed goes on with the shards that
are whole. Legend: N tokens, D width, S sequences.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from blake3 import blake3
from safetensors.torch import save

from mansard.canonical import canonical_json, write_atomically
from mansard.carry_on.sequences import TokenSequence
from mansard.carry_on.wire import Coded, Scheme, bytes_per_token, in_a_row
from mansard.errors import BadInput

SHARD_TOKENS = 65_536
"""At width 5,120 in bf16 a shard has 0.67 GB: small beside a disk, large beside a file's overhead."""
DISK_MARGIN = 1.05


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


def write_shard(folder: Path, shard: Shard, coded: list[Coded], scheme: Scheme) -> None:
    """Write the shard and its digest from its coded sequences; `coded` is emptied: memory holds the shard once less."""
    assert [len(c.states_ND) for c in coded] == [len(s.tokens) for s in shard.sequences], "a state for every token"
    lengths = torch.tensor([len(s.tokens) for s in shard.sequences], dtype=torch.int64)
    whole = in_a_row(coded)
    coded.clear()
    keys = numpy.frombuffer(b"".join(s.key for s in shard.sequences), dtype=numpy.uint8).reshape(len(lengths), -1)
    tensors = {"states": whole.states_ND, "lengths": lengths, "keys": torch.from_numpy(keys.copy())}
    if whole.scales_N is not None and whole.first_SD is not None:
        tensors |= {"scales": whole.scales_N, "first": whole.first_SD}
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"scheme": scheme})
    write_atomically(folder / shard.name, data)
    note = {"format": 1, "digest": blake3(data).hexdigest(), "tokens": shard.tokens}
    write_atomically(folder / f"{shard.name}.json", canonical_json(note))
