"""The base's head, streamed: its rows come from host memory in chunks, so that the node never holds it whole.

The chunk after the one in use is copied meanwhile, and the rows of a step's labels take the same way.
Legend: N tokens, D base width, V vocabulary, C rows of a chunk, X any number of rows.
"""

import warnings
from collections.abc import Iterator

import torch

from mansard.carry_on.double_buffer import DoubleBuffer
from mansard.errors import BadInput
from mansard.models.model_files import model_config, weight_files
from mansard.records import SnapshotId
from mansard.store.store import Store

CHUNK_ROWS = 2048
HEAD_NAMES = ("lm_head.weight", "model.embed_tokens.weight")
"""The head, or the embedding that stands for it where they are tied."""
_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class Head:
    """Rows [V, D] in host memory (pinned where `device` is a GPU), given to `device` chunk by chunk."""

    def __init__(
        self, rows_VD: torch.Tensor, device: torch.device, dtype: torch.dtype, chunk_rows: int = CHUNK_ROWS
    ) -> None:
        self.device = device
        self.vocabulary, self.width = rows_VD.shape
        self.chunk_rows = min(chunk_rows, self.vocabulary)
        rows_VD = rows_VD.to(dtype)
        self.rows_VD = rows_VD.pin_memory() if device.type == "cuda" else rows_VD
        self._buffer = DoubleBuffer(device)
        self._label_rows_ND = torch.empty(0, self.width)
        self._rooms: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def chunks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The vocabulary: (first row, rows [C, D] on the device), in order."""
        return self.streamed(self.rows_VD)

    def streamed(self, rows_XD: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows [C, D] on the device), in order; a chunk is valid until the next is asked for."""
        starts = range(0, len(rows_XD), self.chunk_rows)
        yield from zip(starts, self._buffer.through(rows_XD.split(self.chunk_rows), self._put), strict=True)

    def rows_of(self, labels_N: torch.Tensor) -> torch.Tensor:
        """The labels' rows [N, D] in host memory, valid until they are asked for again (any row for IGNORED).

        Nothing may still copy from them then: a step ends with the loss on the host."""
        if len(self._label_rows_ND) != len(labels_N):
            room = torch.empty(len(labels_N), self.width, dtype=self.rows_VD.dtype)
            self._label_rows_ND = room.pin_memory() if self.device.type == "cuda" else room
        return torch.index_select(self.rows_VD, 0, labels_N.clamp(min=0), out=self._label_rows_ND)

    def room(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for three float32 values a token [3, N] and for a number [N], the same from step to step."""
        if tokens not in self._rooms:
            numbers_N = torch.empty(tokens, dtype=torch.int64, device=self.device)
            self._rooms[tokens] = torch.empty(3, tokens, device=self.device), numbers_N
        return self._rooms[tokens]

    def _put(self, rows_CD: torch.Tensor, turn: int) -> torch.Tensor:
        if self.device.type != "cuda":
            return rows_CD
        return self._buffer.room("rows", turn, rows_CD.shape, rows_CD.dtype).copy_(rows_CD, non_blocking=True)


def head_rows(store: Store, base: SnapshotId) -> torch.Tensor:
    """The head [V, D] mapped out of the base's snapshot: the only tensor of it that is opened.

    BadInput where the base has none, or one that is quantized.
    """
    config = model_config(store, base)
    wanted = HEAD_NAMES[1] if config.get("tie_word_embeddings") else HEAD_NAMES[0]
    for path, file in weight_files(store.manifest(base)).items():
        for entry in file.entries(path):
            if entry.name == wanted:
                if entry.dtype not in _TYPES:
                    raise BadInput(f"base {base[:12]}: {wanted} is {entry.dtype}; a head in 16 or 32 bits is expected")
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="The given buffer is not writable")  # it is only read
                    flat = torch.frombuffer(store.open_object(file.tensors[wanted]), dtype=torch.uint8)
                return flat.view(_TYPES[entry.dtype]).view(*entry.shape)
    raise BadInput(f"base {base[:12]}: no tensor {wanted}; a base whose head is {' or '.join(HEAD_NAMES)} is expected")
