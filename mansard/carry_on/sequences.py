"""Which sequences the base must see: every segment of packed rows, each once, known by the digest of its tokens.

A packed row holds segments that do not see each other, and a state depends on its own segment only, so an engine is
asked for segments and rows are put together again from them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy
from blake3 import blake3
from numpy.typing import NDArray

from mansard.training.data import Packed

Key = bytes
KEY_BYTES = 16
"""128 bits: two of 2^40 sequences collide with a chance below 2^-48."""


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """Tokens that an engine sees as one prompt."""

    key: Key
    tokens: NDArray[numpy.int32]


def key_of(tokens: NDArray[numpy.int32]) -> Key:
    return blake3(numpy.ascontiguousarray(tokens, dtype="<i4").tobytes()).digest(length=KEY_BYTES)


def segments_of(tokens_T: NDArray[numpy.int32], positions_T: NDArray[numpy.int32]) -> list[TokenSequence]:
    """A row's segments, in order (a segment starts at position 0)."""
    starts = [*numpy.flatnonzero(positions_T == 0).tolist(), len(tokens_T)]
    assert starts[0] == 0, "a packed row starts a segment"
    pieces = [tokens_T[a:b] for a, b in pairwise(starts)]
    return [TokenSequence(key_of(p), p) for p in pieces]


def distinct(packed: Sequence[Packed]) -> list[TokenSequence]:
    """Every sequence of every text once, in the order of first appearance."""
    found: dict[Key, TokenSequence] = {}
    for text in packed:
        for tokens, positions in zip(text.tokens_RT, text.positions_RT, strict=True):
            for sequence in segments_of(tokens, positions):
                found.setdefault(sequence.key, sequence)
    return list(found.values())


def groups(sequences: Iterable[TokenSequence], max_tokens: int, max_sequences: int) -> list[list[TokenSequence]]:
    """Runs of sequences of at most so many tokens (one longer sequence stands alone) and so many sequences."""
    made: list[list[TokenSequence]] = []
    room = 0
    for sequence in sequences:
        if not made or len(sequence.tokens) > room or len(made[-1]) >= max_sequences:
            made.append([])
            room = max_tokens
        made[-1].append(sequence)
        room -= len(sequence.tokens)
    return made
