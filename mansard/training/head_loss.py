"""Cross-entropy over a frozen head, chunk by chunk: no logits are kept, and the input's gradient is made on the way.

A frozen head needs no weight gradient, so the gradient of its input is known as soon as a chunk's logits are. A head
that trains goes the ordinary way, through whole logits. Sums are in float32, products in the model's type. Legend: N
tokens, H hidden width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

from mansard.training.linear_product import product
from mansard.training.packing import IGNORED

CHUNK_VALUES = 2**26
"""Logits in hand at once: 256 MB in float32. Smaller chunks make thin products."""

Chunk = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float | None], tuple[torch.Tensor, torch.Tensor]]


class HeadLoss:
    """Summed negative log-likelihoods of a model's head; on an accelerator a chunk's arithmetic is compiled."""

    def __init__(self, head: nn.Linear, softcap: float | None, device: torch.device) -> None:
        self._head = head
        self._softcap = softcap
        self._chunk: Chunk = torch.compile(_chunk, dynamic=False) if device.type == "cuda" else _chunk

    def __call__(self, hidden_BTH: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        """Of all tokens whose label is not IGNORED, in nats (a float32 scalar)."""
        hidden_NH, labels_N = hidden_BTH.flatten(0, 1), labels_BT.flatten()
        weight_VH = self._head.weight
        if weight_VH.requires_grad or self._head.bias is not None:
            return cross_entropy(self.logits(hidden_NH), labels_N, ignore_index=IGNORED, reduction="sum")
        nats: torch.Tensor = _FrozenHead.apply(hidden_NH, weight_VH, labels_N, self._softcap, self._chunk)
        return nats

    def divergence(self, base_NH: torch.Tensor, here_NH: torch.Tensor, is_label_N: torch.Tensor) -> torch.Tensor:
        """KL(base's || here's) of the next token in nats, summed over the tokens where `is_label_N` (float32)."""
        weight_VH = self._head.weight
        if weight_VH.requires_grad or self._head.bias is not None:
            base_NV, here_NV = self.logits(base_NH).log_softmax(-1), self.logits(here_NH).log_softmax(-1)
            return ((base_NV.exp() * (base_NV - here_NV)).sum(-1) * is_label_N).sum()
        nats: torch.Tensor = _Divergence.apply(here_NH, base_NH, weight_VH, is_label_N, self._softcap)
        return nats

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., V] in float32."""
        return _capped(self._head(hidden).float(), self._softcap)

    def held_bytes(self, tokens: int) -> int:
        """Bytes of logits that are in hand at once: a chunk's, in float32 and the model's type."""
        vocabulary: int = self._head.out_features
        rows = tokens if self._head.weight.requires_grad else min(tokens, chunk_rows(vocabulary))
        return rows * vocabulary * (8 + 2 * int(self._head.weight.element_size()))


def chunk_rows(vocabulary: int) -> int:
    """Tokens a chunk: a power of two."""
    return max(1 << (CHUNK_VALUES // vocabulary).bit_length() - 1, 16)


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        labels_N: torch.Tensor,
        softcap: float | None,
        chunk: Chunk,
    ) -> torch.Tensor:
        nats = torch.zeros((), dtype=torch.float32, device=hidden_NH.device)
        grads = []
        rows = chunk_rows(weight_VH.shape[0])
        for hidden_CH, labels_C in zip(hidden_NH.split(rows), labels_N.split(rows), strict=True):
            nats_C, grad_CH = chunk(hidden_CH, weight_VH, labels_C, softcap)
            nats += nats_C
            grads.append(grad_CH if ctx.needs_input_grad[0] else None)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.cat(grads) if len(grads) > 1 else grads[0])
        return nats

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:  # noqa: ANN401
        (grad_NH,) = ctx.saved_tensors
        return grad_NH * upstream.to(grad_NH.dtype), None, None, None, None


class _Divergence(torch.autograd.Function):
    """As `_FrozenHead`, of KL(base || here): its gradient for a logit is here's probability less the base's."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        here_NH: torch.Tensor,
        base_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        is_label_N: torch.Tensor,
        softcap: float | None,
    ) -> torch.Tensor:
        nats = torch.zeros((), dtype=torch.float32, device=here_NH.device)
        grad_NH = torch.empty_like(here_NH)
        rows = max(1, chunk_rows(weight_VH.shape[0]) // 2)
        for first in range(0, len(here_NH), rows):
            chunk = slice(first, first + rows)
            logits_CV = _capped(linear(here_NH[chunk], weight_VH).float(), softcap)
            here_CV = logits_CV.log_softmax(-1)
            base_CV = _capped(linear(base_NH[chunk], weight_VH).float(), softcap).log_softmax(-1)
            raised_CV = base_CV.exp()
            nats += (base_CV.sub_(here_CV).mul_(raised_CV).sum(-1) * is_label_N[chunk]).sum()
            grad_CV = here_CV.exp_().sub_(raised_CV).mul_(is_label_N[chunk].unsqueeze(-1))
            if softcap is not None:
                grad_CV *= 1.0 - (logits_CV / softcap).square()
            grad_NH[chunk] = grad_CV.to(here_NH.dtype) @ weight_VH
        ctx.save_for_backward(grad_NH)
        return nats

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:  # noqa: ANN401
        (grad_NH,) = ctx.saved_tensors
        return grad_NH * upstream.to(grad_NH.dtype), None, None, None, None


def _chunk(
    hidden_CH: torch.Tensor, weight_VH: torch.Tensor, labels_C: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(summed nats, their gradient for `hidden_CH`).

    In place where it can be: a CPU's fresh pages for each of four arrays of logits took as long as the arithmetic. Each
    logit is raised once: with e = exp(logit - largest) and s their sum, the gradient (e / s - onehot) @ weight is taken
    as (e - s onehot) @ weight / s.
    """
    logits_CV = _capped(product(hidden_CH, weight_VH).float(), softcap)
    slope_CV = None if softcap is None else 1.0 - (logits_CV / softcap).square()
    counts_C1 = (labels_C != IGNORED).unsqueeze(-1)
    labels_C1 = labels_C.clamp(min=0).unsqueeze(-1)
    largest_C1 = logits_CV.amax(dim=-1, keepdim=True)
    picked_C1 = logits_CV.gather(1, labels_C1)
    raised_CV = logits_CV.sub_(largest_C1).exp_()
    sum_C1 = raised_CV.sum(dim=-1, keepdim=True)
    nats = ((sum_C1.log() + largest_C1 - picked_C1) * counts_C1).sum()
    grad_CV = raised_CV.scatter_add_(1, labels_C1, -sum_C1)
    if slope_CV is not None:
        grad_CV = grad_CV * slope_CV
    grad_CH = product(grad_CV.to(hidden_CH.dtype), weight_VH.t()) * (counts_C1 / sum_C1).to(hidden_CH.dtype)
    return nats, grad_CH


def _capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return logits if softcap is None else (logits / softcap).tanh() * softcap
