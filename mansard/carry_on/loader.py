"""A step's states in micro-batches, read from the cache ahead of the step, in pinned memory where a GPU takes them.

It stands where the loop's mixture stands: asked for a step's batch it begins to read that step's states and the next
one's in a thread, and the engine takes them when it comes to the batch.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from mansard.carry_on.wire import Coded, pinned
from mansard.training.data import Batch, Mixture

MICRO_TOKENS = 1024
"""Tokens of a micro-batch; whole rows, at least one."""


@dataclass(frozen=True, slots=True)
class Part:
    """A micro-batch in host memory: its rows of N, its states as they are kept, its positions [b, T]."""

    rows: slice
    coded: Coded
    first_rows: torch.Tensor
    positions_BT: torch.Tensor


class GivesCoded(Protocol):
    """The cache, or what stands for one."""

    def of(self, batch: Batch) -> tuple[Coded, list[int]]: ...


def read_parts(states: GivesCoded, batch: Batch, micro_tokens: int, is_pinned: bool) -> list[Part]:
    """The batch's micro-batches."""
    rows, tokens = batch.tokens_BT.shape
    step = max(micro_tokens // tokens, 1)
    parts = []
    for first in range(0, rows, step):
        some = slice(first, min(first + step, rows))
        micro = batch.rows(some)
        coded, first_rows = states.of(micro)
        numbers, positions_BT = torch.tensor(first_rows, dtype=torch.int64), micro.positions_BT
        if is_pinned:
            coded, numbers, positions_BT = pinned(coded), numbers.pin_memory(), positions_BT.pin_memory()
        parts.append(Part(slice(some.start * tokens, some.stop * tokens), coded, numbers, positions_BT))
    return parts


class Loader:
    """The mixture's batches, and their states. Close it when the loop has ended."""

    def __init__(self, states: GivesCoded, mixture: Mixture, micro_tokens: int, is_pinned: bool) -> None:
        self._states = states
        self._mixture = mixture
        self._micro_tokens = micro_tokens
        self._is_pinned = is_pinned
        self._thread = ThreadPoolExecutor(1, "states")
        self._coming: dict[bytes, Future[list[Part]]] = {}

    def batch(self, step: int) -> Batch:
        """The mixture's batch of the 0-based `step`."""
        batch = self._mixture.batch(step)
        for made in (batch, self._mixture.batch(step + 1)):
            if _key(made) not in self._coming:
                self._coming[_key(made)] = self._thread.submit(self._read, made)
        return batch

    def parts(self, batch: Batch) -> list[Part]:
        """Its states; what was not read ahead is read now."""
        coming = self._coming.pop(_key(batch), None)
        return self._read(batch) if coming is None else coming.result()

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _read(self, batch: Batch) -> list[Part]:
        return read_parts(self._states, batch, self._micro_tokens, self._is_pinned)


def _key(batch: Batch) -> bytes:
    """The batch's tokens: batches are told apart by what they hold, not by the object that holds it."""
    return bytes(batch.tokens_BT.numpy().tobytes())
