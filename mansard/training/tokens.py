"""A text as token ids in a file: what is packed into rows, for training and for captures alike.

In memory are a batch of documents and where each document ends (8 bytes a document).
"""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from mansard.training.data import shuffled_order

BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 1024


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Token ids of all documents, one after the other, in a file; `ends` says where each ends (in tokens)."""

    ids: NDArray[numpy.uint32]
    ends: "array[int]"
    size_bytes: int
    highest: int

    def shuffled(self, key: str, end: list[int]) -> Iterator[NDArray[numpy.uint32]]:
        """The documents that have tokens, in the key's order, each followed by `end`."""
        for document in shuffled_order(len(self.ends), key):
            begin = self.ends[document - 1] if document else 0
            if begin < self.ends[document]:
                yield numpy.append(self.ids[begin : self.ends[document]], numpy.array(end, numpy.uint32))


def tokenized(texts: Iterable[str], tokenizer: Any, spool: Path) -> Tokenized:  # noqa: ANN401 - of transformers
    """Token ids without special tokens, written to `spool` batch by batch."""
    ends, size_bytes, count, highest = array("q"), 0, 0, 0
    with spool.open("wb") as file:
        for batch in _batches(texts):
            size_bytes += sum(len(text.encode()) for text in batch)
            for document in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
                ids = numpy.array(document, numpy.uint32)
                highest = max(highest, int(ids.max(initial=0)))
                count += len(ids)
                ends.append(count)
                file.write(ids.data)
    ids = numpy.memmap(spool, numpy.uint32, "r") if count else numpy.empty(0, numpy.uint32)
    return Tokenized(ids, ends, size_bytes, highest)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    room = BATCH_CHARACTERS
    for text in texts:
        batch.append(text)
        room -= len(text)
        if room <= 0 or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, room = [], BATCH_CHARACTERS
    if batch:
        yield batch
