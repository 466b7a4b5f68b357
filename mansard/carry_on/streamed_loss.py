"""Cross-entropy of a streamed head and its gradient, in one pass over the vocabulary.

The pass gives per token the sums of p = exp(logit - m) and of p W, and dL/dy = sum_v p_v W_v / sum_v p_v - W_label. m
is the maximum over the first chunk: any m below overflow gives the same quotient in floating point, so nothing is
rescaled; where the sums grow past `LARGEST_SUM` the pass is made again with the whole vocabulary's maximum. On a GPU
what follows a product is one compiled kernel. Legend: N tokens, n of a block, D base width, V vocabulary, C rows of a
chunk.
"""

from dataclasses import dataclass
from functools import partial

import torch

from mansard.carry_on.head import Head
from mansard.carry_on.replay import Replay, compiled
from mansard.training.packing import IGNORED

BLOCK_TOKENS = {"cuda": 4096, "cpu": 2048}
"""Tokens whose logits stand in memory at once: 4,096 x 2,048 in float32 are 34 MB."""
LARGEST_SUM = 1e30
"""Sums of p beyond it are made again with another m: float32 ends at 3e38, and sums of p W must not reach that."""


@dataclass(frozen=True, slots=True)
class HeadLoss:
    """`nats_N` is 0 where there is no label; `labels` counts the others."""

    nats_N: torch.Tensor
    labels: int


@dataclass(frozen=True, slots=True)
class _Sums:
    """What a pass fills, always in the same memory: sums of p, the labels' logits, the sums of p W where they are
    asked for. `ahead_N` says how many rows after the chunk's first a token's label is."""

    most_N: torch.Tensor
    sum_N: torch.Tensor
    label_N: torch.Tensor
    ahead_N: torch.Tensor
    pull_ND: torch.Tensor | None

    def tensors(self) -> list[torch.Tensor]:
        always = [self.most_N, self.sum_N, self.label_N, self.ahead_N]
        return always if self.pull_ND is None else [*always, self.pull_ND]


def head_loss(
    head: Head,
    y_ND: torch.Tensor,
    labels_N: torch.Tensor,
    pull_ND: torch.Tensor | None,
    replay: Replay | None = None,
) -> HeadLoss:
    """Cross-entropy of the head's softmax at y.

    Where `pull_ND` (float32, like y) lends the memory for it, y is overwritten with the gradient of the *mean* over
    labels. `labels_N` (int64, on the CPU) is IGNORED where nothing is predicted. With `replay` a whole chunk's part in
    the sums is recorded and played again.
    """
    labels_there, count = labels_N.to(y_ND.device), int((labels_N != IGNORED).sum())
    is_label_N = labels_there != IGNORED
    replay = replay or Replay(y_ND.device, is_recording=False)
    totals_3N, ahead_N = head.room(len(y_ND))
    sums = _Sums(totals_3N[0], totals_3N[1], totals_3N[2], ahead_N, pull_ND)
    _pass(head, y_ND, labels_there, sums, replay, is_first=True)
    rows_ND = None if pull_ND is None else head.rows_of(labels_N)  # while the device is at the pass
    if not float(sums.sum_N.max()) < LARGEST_SUM:  # the first chunk's maximum lay too far below the whole one's
        sums.most_N.copy_(_true_maximum(head, y_ND))
        _pass(head, y_ND, labels_there, sums, replay, is_first=False)
    nats_N = torch.where(is_label_N, sums.most_N + sums.sum_N.log() - sums.label_N, 0.0)
    if pull_ND is not None and rows_ND is not None:
        slope_of, weight_N = compiled(_slope, y_ND.device), is_label_N / max(count, 1)
        for start, rows_nD in head.streamed(rows_ND):
            block = slice(start, start + len(rows_nD))
            slope_of(y_ND[block], pull_ND[block], sums.sum_N[block], rows_nD, weight_N[block])
    return HeadLoss(nats_N, count)


def _pass(
    head: Head, y_ND: torch.Tensor, labels_N: torch.Tensor, sums: _Sums, replay: Replay, is_first: bool
) -> None:
    """Fill the sums. `is_first`: m becomes the first chunk's maximum; otherwise it is as it is."""
    for tensor in (sums.sum_N, sums.label_N, *([] if sums.pull_ND is None else [sums.pull_ND])):
        tensor.zero_()
    sums.ahead_N.copy_(labels_N)
    for number, (_, rows_CD) in enumerate(head.chunks()):
        if is_first and number == 0:
            most_N = sums.most_N.fill_(-torch.inf)
            replay.run("most", partial(_raise_most, y_ND, rows_CD, most_N), y_ND, rows_CD, most_N)
        replay.run("chunk", partial(_add_chunk, y_ND, rows_CD, sums), y_ND, rows_CD, *sums.tensors())


def _true_maximum(head: Head, y_ND: torch.Tensor) -> torch.Tensor:
    most_N = torch.full((len(y_ND),), -torch.inf, device=y_ND.device)
    for _, rows_CD in head.chunks():
        _raise_most(y_ND, rows_CD, most_N)
    return most_N


def _raise_most(y_ND: torch.Tensor, rows_CD: torch.Tensor, most_N: torch.Tensor) -> None:
    """To the chunk's maximum (in place)."""
    for block in _blocks(y_ND):
        torch.maximum(most_N[block], _product(y_ND[block], rows_CD).amax(-1), out=most_N[block])


def _add_chunk(y_ND: torch.Tensor, rows_CD: torch.Tensor, sums: _Sums) -> None:
    """One chunk of the vocabulary, for every block of tokens (in place)."""
    weigh = compiled(_weigh, y_ND.device)
    for block in _blocks(y_ND):
        logits_nC = _product(y_ND[block], rows_CD)
        totals = sums.sum_N[block], sums.label_N[block]
        weights_nC = weigh(logits_nC, sums.most_N[block], sums.ahead_N[block], *totals, rows_CD.dtype)
        del logits_nC
        if sums.pull_ND is None:
            continue
        pull_nD = sums.pull_ND[block]
        if _is_mixed(y_ND, rows_CD):
            torch.addmm(pull_nD, weights_nC, rows_CD, out_dtype=torch.float32, out=pull_nD)
        else:
            pull_nD.addmm_(weights_nC.float(), rows_CD.float())
    sums.ahead_N.sub_(len(rows_CD))


def _weigh(
    logits_nC: torch.Tensor,
    most_n: torch.Tensor,
    ahead_n: torch.Tensor,
    sum_n: torch.Tensor,
    label_n: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """p [n, C] (in `dtype` on a GPU); its sums go into `sum_n`, the logits of labels in this chunk into `label_n`."""
    rows = logits_nC.shape[1]
    at_label_n = logits_nC.gather(1, ahead_n.clamp(0, rows - 1)[:, None])[:, 0]
    label_n.add_(torch.where((ahead_n >= 0) & (ahead_n < rows), at_label_n, 0.0))
    if not logits_nC.is_cuda:  # in place; compiled, it would be one more array
        weights_nC = logits_nC.sub_(most_n[:, None]).exp_()
        sum_n.add_(weights_nC.sum(-1))
        return weights_nC
    weights_nC = (logits_nC - most_n[:, None]).exp()
    sum_n.add_(weights_nC.sum(-1))
    return weights_nC.to(dtype)


def _slope(
    y_nD: torch.Tensor, pull_nD: torch.Tensor, sum_n: torch.Tensor, rows_nD: torch.Tensor, weight_n: torch.Tensor
) -> None:
    """dL/dy into y's place, of tokens that count by `weight_n`."""
    y_nD.copy_((pull_nD / sum_n[:, None] - rows_nD) * weight_n[:, None])


def _blocks(y_ND: torch.Tensor) -> list[slice]:
    size = BLOCK_TOKENS[y_ND.device.type]
    return [slice(first, first + size) for first in range(0, len(y_ND), size)]


def _product(y_ND: torch.Tensor, rows_CD: torch.Tensor) -> torch.Tensor:
    """y W^T in float32 (16-bit factors are multiplied as they are and summed in float32)."""
    if _is_mixed(y_ND, rows_CD):
        return torch.mm(y_ND.to(rows_CD.dtype), rows_CD.T, out_dtype=torch.float32)
    return y_ND.float() @ rows_CD.float().T


def _is_mixed(y_ND: torch.Tensor, rows_CD: torch.Tensor) -> bool:
    return bool(y_ND.is_cuda and rows_CD.dtype != torch.float32)
