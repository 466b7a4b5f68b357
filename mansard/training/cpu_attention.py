"""Rotary self-attention on a CPU in float32, between the norm and the residual.

The three products and the turning by positions are one operation with a backward of its own (in place; where the
weights are frozen nothing of the input is kept), attention itself is `packed_attention`. Legend: M tokens, K inputs, N
outputs, B rows, H heads, T tokens of a row, D head width.
"""

from typing import Any

import torch
from torch import nn

from mansard.training.attention import NAME as PACKED
from mansard.training.attention import packed_attention
from mansard.training.onednn import are_plain, product

ROTARY = frozenset({"LlamaAttention", "MistralAttention", "Qwen2Attention"})
"""transformers' classes that compute what Attention does, where they have no biases."""


def is_rotary(module: nn.Module) -> bool:
    """Whether Attention computes what `module` does."""
    if type(module).__name__ not in ROTARY or module.config._attn_implementation != PACKED:
        return False
    return are_plain(module, "q_proj", "k_proj", "v_proj", "o_proj")


class Attention(nn.Module):
    """Rotary self-attention over packed rows; its four linears keep their names."""

    def __init__(self, attention: Any) -> None:  # noqa: ANN401 - one that `is_rotary`
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = attention.q_proj, attention.k_proj, attention.v_proj
        self.o_proj = attention.o_proj
        self.scaling, self.layer_idx = attention.scaling, attention.layer_idx
        self.num_key_value_groups, self.is_causal = attention.num_key_value_groups, True  # transformers' sdpa asks
        self.dropout = attention.attention_dropout

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,  # noqa: ANN401 - transformers' cache, where a model generates
        **others: Any,  # noqa: ANN401 - what transformers passes on
    ) -> tuple[torch.Tensor, None]:
        weights = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        query, key, value = _QueryKeyValue.apply(hidden_states, *weights, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        others |= {"scaling": self.scaling, "dropout": self.dropout if self.training else 0.0}
        mixed, _ = packed_attention(self, query, key, value, attention_mask, **others)
        output_MK: torch.Tensor = _Product.apply(mixed.flatten(0, 1).flatten(1), self.o_proj.weight)
        return output_MK.view_as(hidden_states), None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 - autograd's
        ctx.save_for_backward(weight_NK, *((x_MK,) if ctx.needs_input_grad[1] else ()))
        return product(x_MK, weight_NK)

    @staticmethod
    def backward(ctx: Any, grad_MN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:  # noqa: ANN401
        weight_NK, *kept = ctx.saved_tensors
        return product(grad_MN, weight_NK.t()), grad_MN.t() @ kept[0] if kept else None


class _QueryKeyValue(torch.autograd.Function):
    """Query, key and value states [B, heads, T, D], the first two rotated by their positions."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        x_BTK: torch.Tensor,
        query_NK: torch.Tensor,
        key_NK: torch.Tensor,
        value_NK: torch.Tensor,
        cosine_BTD: torch.Tensor,
        sine_BTD: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        (rows, tokens, _), width = x_BTK.shape, cosine_BTD.shape[-1]
        x_MK = x_BTK.flatten(0, 1)
        query, key, value = (
            product(x_MK, weight).view(rows, tokens, -1, width).transpose(1, 2)
            for weight in (query_NK, key_NK, value_NK)
        )
        ctx.save_for_backward(
            query_NK, key_NK, value_NK, cosine_BTD, sine_BTD, *((x_MK,) if any(ctx.needs_input_grad[1:4]) else ())
        )
        turned = [_turned(x, cosine_BTD, sine_BTD, torch.empty_like(x, memory_format=torch.contiguous_format), 1)
                  for x in (query, key)]  # fmt: skip
        return *turned, value

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        query_NK, key_NK, value_NK, cosine_BTD, sine_BTD, *kept = ctx.saved_tensors
        rows, _, tokens, width = grads[0].shape
        grads_MN = []
        for grad in grads[:2]:
            flat = grad.new_empty(rows, tokens, grad.shape[1], width)
            _turned(grad, cosine_BTD, sine_BTD, flat.transpose(1, 2), -1)
            grads_MN.append(flat.view(rows * tokens, -1))
        grads_MN.append(grads[2].transpose(1, 2).reshape(rows * tokens, -1))
        to_x_MK = product(grads_MN[0], query_NK.t())
        to_x_MK.add_(product(grads_MN[1], key_NK.t())).add_(product(grads_MN[2], value_NK.t()))
        to_weights = [grad_MN.t() @ kept[0] if kept else None for grad_MN in grads_MN]
        return to_x_MK.view(rows, tokens, -1), *to_weights, None, None


def _turned(
    x_BHTD: torch.Tensor, cosine_BTD: torch.Tensor, sine_BTD: torch.Tensor, into_BHTD: torch.Tensor, sign: int
) -> torch.Tensor:
    """Every head turned by its token's angles (backwards where `sign` is -1), written into `into_BHTD`."""
    half = x_BHTD.shape[-1] // 2
    cosine_B1TD, sine_B1TD = cosine_BTD.unsqueeze(1), sine_BTD.unsqueeze(1)
    torch.mul(x_BHTD, cosine_B1TD, out=into_BHTD)
    into_BHTD[..., :half].addcmul_(x_BHTD[..., half:], sine_B1TD[..., :half], value=-sign)
    into_BHTD[..., half:].addcmul_(x_BHTD[..., :half], sine_B1TD[..., half:], value=sign)
    return into_BHTD
