"""The base's head, streamed: its rows come from host memory in chunks, so that the node never holds it whole.

One pass over the vocabulary gives the loss and its gradient: per token the sums of p = exp(logit - m) and of p W, with
dL/dy = sum_v p_v W_v / sum_v p_v - W_label. m is the maximum over the first chunk: any m below overflow gives the same
quotient in floating point, so nothing is rescaled; where the sums grow past `LARGEST_SUM` the pass is made again with
the whole vocabulary's maximum. The chunk after the one in use is copied meanwhile (two buffers). Legend: N tokens, D
base width, V vocabulary, C rows of a chunk.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from mansard.carry_on.replay import Replay
from mansard.errors import BadInput
from mansard.models.model_files import model_config, weight_files
from mansard.records import SnapshotId
from mansard.store.store import Store
from mansard.training.packing import IGNORED

CHUNK_ROWS = 2048
BLOCK_TOKENS = 2048
"""Tokens whose logits stand in memory at once: 2,048 x 2,048 in float32 are 17 MB."""
LARGEST_SUM = 1e30
"""Sums of p beyond it are made again with another m: float32 ends at 3e38, and sums of p W must not reach that."""
LABEL_TOKENS = 256
"""Tokens whose states and label's rows are widened to float32 at once."""
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
        self.is_streamed = device.type == "cuda"
        rows_VD = rows_VD.to(dtype)
        self.rows_VD = rows_VD.pin_memory() if self.is_streamed else rows_VD
        self._buffers: list[torch.Tensor] = []
        self._room_2N = torch.empty(2, 0)
        if self.is_streamed:
            self._stream = torch.cuda.Stream(device)
            shape = (self.chunk_rows, self.width)
            self._buffers = [torch.empty(shape, dtype=dtype, device=device) for _ in range(2)]

    def chunks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows [C, D] on the device), in order; a chunk is valid until the next but one is asked for."""
        starts = list(range(0, self.vocabulary, self.chunk_rows))
        if not self.is_streamed:
            yield from ((start, self.rows_VD[start : start + self.chunk_rows]) for start in starts)
            return
        copied = [torch.cuda.Event(), torch.cuda.Event()]
        used = [torch.cuda.Event(), torch.cuda.Event()]
        self._copy(starts[0], 0, copied, None)
        for number, start in enumerate(starts):
            turn = number % 2
            if number + 1 < len(starts):
                self._copy(starts[number + 1], 1 - turn, copied, used[1 - turn] if number else None)
            torch.cuda.current_stream().wait_event(copied[turn])
            yield start, self._buffers[turn][: min(self.chunk_rows, self.vocabulary - start)]
            used[turn].record()

    def room(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for m and for the sums of p, [N] each, the same from step to step."""
        if self._room_2N.shape[1] != tokens:
            self._room_2N = torch.empty(2, tokens, device=self.device)
        return self._room_2N[0], self._room_2N[1]

    def _copy(self, start: int, turn: int, copied: list[torch.cuda.Event], after: torch.cuda.Event | None) -> None:
        rows = self.rows_VD[start : start + self.chunk_rows]
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            self._buffers[turn][: len(rows)].copy_(rows, non_blocking=True)
            copied[turn].record(self._stream)


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


@dataclass(frozen=True, slots=True)
class HeadLoss:
    """`nats_N` is 0 where there is no label; `labels` counts the others."""

    nats_N: torch.Tensor
    labels: int


def head_loss(
    head: Head,
    y_ND: torch.Tensor,
    labels_N: torch.Tensor,
    pull_ND: torch.Tensor | None,
    replay: Replay | None = None,
) -> HeadLoss:
    """Cross-entropy of the head's softmax at y in one pass over the vocabulary.

    Where `pull_ND` (float32, like y) lends the memory for it, y is overwritten with the gradient of the *mean* over
    labels. `labels_N` (int64, on the CPU) is IGNORED where nothing is predicted. With `replay` a whole chunk's part in
    the sums is recorded and played again.
    """
    tokens, device = len(y_ND), y_ND.device
    labels_there, count = labels_N.to(device), int((labels_N != IGNORED).sum())
    order, bounds = _by_chunk(labels_N, head.vocabulary, head.chunk_rows)
    rows_ND, (most_N, sum_N) = torch.zeros_like(y_ND), head.room(tokens)
    labels = _Labels(order.to(device), bounds, labels_there, rows_ND)
    replay = replay or Replay(device, is_recording=False)
    _pass(head, y_ND, most_N, sum_N, pull_ND, labels, replay)
    if not float(sum_N.max()) < LARGEST_SUM:  # the first chunk's maximum lay too far below the whole one's
        most_N.copy_(_true_maximum(head, y_ND))
        _pass(head, y_ND, most_N, sum_N, pull_ND, None, replay)
    label_N = torch.zeros(tokens, device=device)
    for block in _blocks(tokens, LABEL_TOKENS):
        label_N[block] = (y_ND[block].float() * rows_ND[block].float()).sum(-1)
    is_label_N = labels_there != IGNORED
    nats_N = torch.where(is_label_N, most_N + sum_N.log() - label_N, 0.0)
    if pull_ND is not None:
        weight_N = is_label_N / max(count, 1)
        for block in _blocks(tokens, LABEL_TOKENS):
            pulled = pull_ND[block].div_(sum_N[block, None]).sub_(rows_ND[block]).mul_(weight_N[block, None])
            y_ND[block] = pulled.to(y_ND.dtype)
    return HeadLoss(nats_N, count)


@dataclass(frozen=True, slots=True)
class _Labels:
    """Token numbers by label with each chunk's bounds, the labels, and the labels' rows that a pass collects [N, D]."""

    order: torch.Tensor
    bounds: list[int]
    labels_N: torch.Tensor
    rows_ND: torch.Tensor

    def collect(self, number: int, start: int, rows_CD: torch.Tensor) -> None:
        hits = self.order[self.bounds[number] : self.bounds[number + 1]]
        self.rows_ND.index_copy_(0, hits, rows_CD.index_select(0, self.labels_N.index_select(0, hits) - start))


def _pass(
    head: Head,
    y_ND: torch.Tensor,
    most_N: torch.Tensor,
    sum_N: torch.Tensor,
    pull_ND: torch.Tensor | None,
    labels: _Labels | None,
    replay: Replay,
) -> None:
    """Sums of p and of p W over the vocabulary into `sum_N` and `pull_ND`. With `labels`, the first of two passes at
    most: their rows are collected, and m becomes the first chunk's maximum; without, m is as it is."""
    sum_N.zero_()
    if pull_ND is not None:
        pull_ND.zero_()
    for number, (start, rows_CD) in enumerate(head.chunks()):
        if labels is not None:
            labels.collect(number, start, rows_CD)
            if number == 0:
                for block in _blocks(len(y_ND), BLOCK_TOKENS):
                    most_N[block] = _product(y_ND[block], rows_CD).amax(-1)
        fixed = [y_ND, rows_CD, most_N, sum_N, *([] if pull_ND is None else [pull_ND])]
        replay.run("chunk", partial(_add_chunk, y_ND, rows_CD, most_N, sum_N, pull_ND), *fixed)


def _true_maximum(head: Head, y_ND: torch.Tensor) -> torch.Tensor:
    most_N = torch.full((len(y_ND),), -torch.inf, device=y_ND.device)
    for _, rows_CD in head.chunks():
        for block in _blocks(len(y_ND), BLOCK_TOKENS):
            most_N[block] = torch.maximum(most_N[block], _product(y_ND[block], rows_CD).amax(-1))
    return most_N


def _add_chunk(
    y_ND: torch.Tensor, rows_CD: torch.Tensor, most_N: torch.Tensor, sum_N: torch.Tensor, pull_ND: torch.Tensor | None
) -> None:
    """One chunk of the vocabulary, for every block of tokens (in place)."""
    for block in _blocks(len(y_ND), BLOCK_TOKENS):
        weights_NC = _product(y_ND[block], rows_CD).sub_(most_N[block, None]).exp_()
        sum_N[block].add_(weights_NC.sum(-1))
        if pull_ND is None:
            continue
        if y_ND.is_cuda and rows_CD.dtype != torch.float32:
            weights = weights_NC.to(rows_CD.dtype)
            torch.addmm(pull_ND[block], weights, rows_CD, out_dtype=torch.float32, out=pull_ND[block])
        else:
            pull_ND[block].addmm_(weights_NC, rows_CD.float())


def _blocks(tokens: int, size: int) -> list[slice]:
    return [slice(first, first + size) for first in range(0, tokens, size)]


def _product(y_ND: torch.Tensor, rows_CD: torch.Tensor) -> torch.Tensor:
    """y W^T in float32 (16-bit factors are multiplied as they are and summed in float32)."""
    if y_ND.is_cuda and rows_CD.dtype != torch.float32:
        return torch.mm(y_ND.to(rows_CD.dtype), rows_CD.T, out_dtype=torch.float32)
    return y_ND.float() @ rows_CD.float().T


def _by_chunk(labels_N: torch.Tensor, vocabulary: int, chunk_rows: int) -> tuple[torch.Tensor, list[int]]:
    """Token numbers in the order of their labels, and where each chunk's begin (IGNORED ones are left out)."""
    sorted_N, order = labels_N.sort()
    edges = torch.arange(0, vocabulary + chunk_rows, chunk_rows)
    bounds = torch.searchsorted(sorted_N, edges).tolist()
    return order, bounds
