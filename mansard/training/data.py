"""Training text: JSON lines -> packed rows -> a deterministic mixture. Rows are in memory here; shards.py maps them.

Every source's rows are shuffled once an epoch by the data's seed, and the schedule takes from the source that is
furthest behind its share, so the achieved fractions are known before the first step and any batch can be made from its
number alone: a resumed run needs no more than the step, and any number of ranks sees the same batches.
"""

import json
import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import numpy
import torch

from mansard.errors import BadInput
from mansard.models.vocabulary import end_of
from mansard.store.stream import lines_of
from mansard.training.packing import Rows, labels_of, pack


@dataclass(frozen=True, slots=True)
class Batch:
    """Int64 tensors [B, T]; which rows are general text (bool [B]), where that is known."""

    tokens_BT: torch.Tensor
    positions_BT: torch.Tensor
    labels_BT: torch.Tensor
    is_general_B: torch.Tensor | None = None

    def each(self, act: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """`act` on every tensor."""
        general_B = None if self.is_general_B is None else act(self.is_general_B)
        return Batch(act(self.tokens_BT), act(self.positions_BT), act(self.labels_BT), general_B)

    def rows(self, chosen: slice | torch.Tensor) -> "Batch":
        return self.each(lambda tensor: tensor[chosen])

    def of_rank(self, rank: int, world: int) -> "Batch":
        """The rows that one of `world` ranks takes; all of them together take each row once."""
        rows = len(self.tokens_BT) // world
        return self.rows(slice(rank * rows, (rank + 1) * rows))

    def parts(self, rows: int | None) -> "list[Batch]":
        """In pieces of at most `rows` rows (None: one), rows of one segment first in each."""
        count = len(self.tokens_BT)
        size = rows or count
        return [self.rows(slice(first, first + size)).whole_first() for first in range(0, count, size)]

    def whole_first(self) -> "Batch":
        """The same rows, those of one segment before the others."""
        return self.rows((self.positions_BT[:, 1:] == 0).any(dim=1).int().argsort(stable=True))

    @property
    def general_rows(self) -> torch.Tensor:
        """The numbers of the rows of general text."""
        if self.is_general_B is None:
            return torch.zeros(0, dtype=torch.long)
        return torch.nonzero(self.is_general_B).flatten()


class PackedText(Protocol):
    """One text in packed rows. `bytes_per_token` is of the whole text, without special tokens."""

    @property
    def name(self) -> str: ...

    @property
    def bytes_per_token(self) -> float: ...

    @property
    def row_tokens(self) -> int: ...

    def __len__(self) -> int:
        """How many rows."""
        ...

    def rows(self, numbers: Sequence[int]) -> tuple[Rows, Rows]:
        """(tokens_BT, positions_BT) of these rows, copied."""
        ...

    def batch(self, numbers: Sequence[int]) -> Batch: ...


T = TypeVar("T", bound=PackedText)


@dataclass(frozen=True, slots=True)
class Packed:
    """One text, packed, in memory."""

    name: str
    tokens_RT: Rows
    positions_RT: Rows
    bytes_per_token: float

    @property
    def row_tokens(self) -> int:
        return int(self.tokens_RT.shape[1])

    def __len__(self) -> int:
        return len(self.tokens_RT)

    def rows(self, numbers: Sequence[int]) -> tuple[Rows, Rows]:
        return self.tokens_RT[list(numbers)], self.positions_RT[list(numbers)]

    def batch(self, numbers: Sequence[int]) -> Batch:
        return as_batch(*self.rows(numbers))


def as_batch(tokens: Rows, positions: Rows, is_general_B: torch.Tensor | None = None) -> Batch:
    tokens_BT, positions_BT = torch.from_numpy(tokens).long(), torch.from_numpy(positions).long()
    return Batch(tokens_BT, positions_BT, labels_of(tokens_BT, positions_BT), is_general_B)


def read_texts(raw: bytes, name: str) -> list[str]:
    """The "text" of each JSON line. BadInput names the source, the line and what would be right."""
    return list(each_text([raw], name))


def each_text(chunks: Iterable[bytes], name: str) -> Iterator[str]:
    """The same of a file that comes in chunks, text by text."""
    has_text, begin, end = False, 0, 0
    for number, line in enumerate(lines_of(chunks), start=1):
        begin, end = end, end + len(line) + 1
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise BadInput(f"{name}: byte {begin + error.start} is not UTF-8; save the file as UTF-8") from error
        except json.JSONDecodeError as error:
            raise BadInput(f"{name}: line {number} is not JSON ({error.msg}); {{'text': ...}} is expected") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            start = line.decode()[:60]
            raise BadInput(f"{name}: line {number} has no 'text': {start!r}; {{'text': ...}} is expected")
        text = row["text"]
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadInput(f"{name}: line {number}: half of an escaped surrogate pair; mend the text") from error
        has_text = has_text or bool(text.strip())
        yield text
    if not has_text:
        raise BadInput(f"{name}: the file holds no text; one {{'text': ...}} a line is expected")


def shuffled_order(count: int, key: str) -> "array[int]":
    """The order of `count` things that `key` gives: what shuffling a list of them would leave."""
    order = array("q", range(count))
    random.Random(key).shuffle(order)  # noqa: S311 - an order, not a secret
    return order


def pack_texts(name: str, texts: Sequence[str], tokenizer: Any, row_tokens: int, seed: int) -> Packed:  # noqa: ANN401
    """Tokenize, shuffle the documents with `seed`, end each with EOS (where there is one), pack."""
    documents = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    size_bytes = sum(len(t.encode()) for t in texts)
    num_tokens = sum(len(d) for d in documents)
    end = end_of(tokenizer)
    ordered = (documents[i] for i in shuffled_order(len(documents), f"{seed}:{name}"))
    tokens_RT, positions_RT = pack((d + end for d in ordered if d), row_tokens, tokenizer.bos_token_id)
    return Packed(name, tokens_RT, positions_RT, size_bytes / max(num_tokens, 1))


def require_rows(packed: T, name: str, rows: int) -> T:
    """`packed`, or BadInput where it has fewer rows (a training source needs a batch of them, a held-out one a row)."""
    if len(packed) < rows:
        raise BadInput(
            f"{name}: {len(packed) * packed.row_tokens:,} packed tokens, at least one batch of {rows} x "
            f"{packed.row_tokens} is needed; add text, or make train.batch_sequences or data.sequence_tokens smaller"
        )
    return packed


class Mixture:
    """Batches by step number; `weights` are shares of tokens (every row has equally many); `general` names the sources
    of general text."""

    def __init__(
        self,
        sources: Sequence[PackedText],
        weights: Sequence[float],
        batch_sequences: int,
        seed: int,
        general: Set[str] = frozenset(),
    ) -> None:
        self.sources = tuple(sources)
        self._is_general = [source.name in general for source in sources]
        self.batch_sequences = batch_sequences
        self._seed = seed
        self._shares = [weight / sum(weights) for weight in weights]
        self._schedule: list[tuple[int, int]] = []
        self._taken = [0] * len(sources)
        self._order = lru_cache(maxsize=2 * len(sources))(self._shuffled)

    def batch(self, step: int) -> Batch:
        """The batch of the 0-based `step`; the same whatever was asked before."""
        first = step * self.batch_sequences
        picked = [self._row(source, n) for source, n in self._rows(first, first + self.batch_sequences)]
        tokens, positions = zip(*(self.sources[source].rows([row]) for source, row in picked), strict=True)
        is_general_B = torch.tensor([self._is_general[source] for source, _ in picked])
        return as_batch(numpy.concatenate(tokens), numpy.concatenate(positions), is_general_B)

    def rows_taken(self, steps: int) -> dict[str, int]:
        """How many rows of each source `steps` steps take."""
        rows = self._rows(0, steps * self.batch_sequences)
        return {s.name: sum(index == i for index, _ in rows) for i, s in enumerate(self.sources)}

    def _rows(self, first: int, end: int) -> list[tuple[int, int]]:
        """(source, how many of its rows came before) of the rows from `first` up to `end`; a tie goes to the first
        source."""
        while len(self._schedule) < end:
            due = len(self._schedule) + 1
            behind = [share * due - taken for share, taken in zip(self._shares, self._taken, strict=True)]
            source = behind.index(max(behind))
            self._schedule.append((source, self._taken[source]))
            self._taken[source] += 1
        return self._schedule[first:end]

    def _row(self, source: int, number: int) -> tuple[int, int]:
        epoch, place = divmod(number, len(self.sources[source]))
        return source, self._order(source, epoch)[place]

    def _shuffled(self, source: int, epoch: int) -> "array[int]":
        return shuffled_order(len(self.sources[source]), f"{self._seed}:{self.sources[source].name}:{epoch}")
