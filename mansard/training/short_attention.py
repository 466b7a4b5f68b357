"""Attention over short rows on a CPU: only the lower triangle is computed, the probabilities are kept. States and
probabilities are in float32; products may be in bf16 (linear_product.py), 1.7 times as fast.

torch's kernel for CPUs works in small pieces and computes scores again in backward: 1.7 ms forward and 4.3 ms backward
for four rows of 256 tokens and two heads of 64, where these batched products take 1.3 and 2.3 ms (one core of a Zen 4,
2026-11-26). What is kept grows with the square of the row, so longer rows than LONGEST stay torch's.
Legend: B rows, H heads, T tokens, D head width, G = B x H, Q tokens of a block of queries, K keys that the block sees.
"""

from collections.abc import Iterator
from typing import Any

import torch

from mansard.training.linear_product import HAS_BF16

LONGEST = 512
"""Kept are 2 KB a token and head there, as much as eight states of width 64."""
BLOCK = 64
"""Queries at once. Half as many make thin products, twice as many compute more of what the mask forbids."""


def is_short(query_BHTD: torch.Tensor, key_BHTD: torch.Tensor) -> bool:
    """Whether `short_attention` is for it: rows that see nothing but themselves (no cache of keys before them)."""
    on_cpu: bool = query_BHTD.device.type == "cpu" and query_BHTD.dtype == torch.float32
    return on_cpu and query_BHTD.shape[2] == key_BHTD.shape[2] <= LONGEST


def short_attention(
    query_BHTD: torch.Tensor,
    key_BHTD: torch.Tensor,
    value_BHTD: torch.Tensor,
    mask_B1TT: torch.Tensor | None,
    whole: int,
    scaling: float,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """[B, T, H, D], by products in `dtype` (in float32 on a CPU without units for bf16). The first `whole` rows are
    causal; the others add the mask, which allows no later token either."""
    if not HAS_BF16:
        dtype = torch.float32
    mixed: torch.Tensor = _ShortAttention.apply(query_BHTD, key_BHTD, value_BHTD, mask_B1TT, whole, scaling, dtype)
    return mixed


def _blocks(tokens: int) -> Iterator[tuple[slice, slice]]:
    """Queries and the keys they see, the last first."""
    for first in reversed(range(0, tokens, BLOCK)):
        end = min(first + BLOCK, tokens)
        yield slice(first, end), slice(0, end)


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        query_BHTD: torch.Tensor,
        key_BHTD: torch.Tensor,
        value_BHTD: torch.Tensor,
        mask_B1TT: torch.Tensor | None,
        whole: int,
        scaling: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        rows, heads, tokens, width = query_BHTD.shape
        query_GTD, key_GTD, value_GTD = (
            x.to(dtype).reshape(rows * heads, tokens, width) for x in (query_BHTD, key_BHTD, value_BHTD)
        )
        later_QQ = torch.full((BLOCK, BLOCK), -torch.inf).triu_(1)
        mixed_GTD = torch.empty_like(query_GTD)
        kept = []
        for queries, keys in _blocks(tokens):
            scores_GQK = torch.bmm(query_GTD[:, queries], key_GTD[:, keys].transpose(1, 2)).float().mul_(scaling)
            count = queries.stop - queries.start
            scores_GQK[: whole * heads, :, queries] += later_QQ[:count, :count]
            if mask_B1TT is not None:
                scores_GQK[whole * heads :].view(-1, heads, count, keys.stop).add_(mask_B1TT[:, :, queries, keys])
            raised_GQK = torch.softmax(scores_GQK, -1)
            torch.bmm(raised_GQK.to(dtype), value_GTD[:, keys], out=mixed_GTD[:, queries])
            kept.append(raised_GQK)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(query_GTD, key_GTD, value_GTD, *kept)
            ctx.scaling, ctx.heads = scaling, heads
        return mixed_GTD.float().view(rows, heads, tokens, width).transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, grad_BTHD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        query_GTD, key_GTD, value_GTD, *kept = ctx.saved_tensors
        dtype = query_GTD.dtype
        grad_GTD = grad_BTHD.to(dtype).transpose(1, 2).reshape(query_GTD.shape)
        to_query, to_key, to_value = (torch.zeros_like(x) for x in (query_GTD, key_GTD, value_GTD))
        for (queries, keys), raised_GQK in zip(_blocks(query_GTD.shape[1]), kept, strict=True):
            grad_GQD = grad_GTD[:, queries]
            to_raised_GQK = torch.bmm(grad_GQD, value_GTD[:, keys].transpose(1, 2))
            to_scores_GQK = torch._softmax_backward_data(to_raised_GQK.float(), raised_GQK, -1, torch.float32).to(dtype)
            torch.bmm(to_scores_GQK, key_GTD[:, keys], out=to_query[:, queries])
            to_key[:, keys].baddbmm_(to_scores_GQK.transpose(1, 2), query_GTD[:, queries], alpha=ctx.scaling)
            to_value[:, keys].baddbmm_(raised_GQK.to(dtype).transpose(1, 2), grad_GQD)
        to_query.mul_(ctx.scaling)
        shape = (-1, ctx.heads, *query_GTD.shape[1:])
        return *(x.float().view(shape) for x in (to_query, to_key, to_value)), None, None, None, None
