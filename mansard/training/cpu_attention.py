"""Rotary self-attention on a CPU in float32, between the norm and the residual; its products may be in bf16.

The three products and the turning by positions are one operation with a backward of its own (in place; where the
weights are frozen nothing of the input is kept), attention itself is `packed_attention`. Legend: M tokens, K inputs, N
outputs, B rows, H heads, T tokens of a row, D head width.
"""

from typing import Any

import torch
from torch import nn

from mansard.training.attention import NAME as PACKED
from mansard.training.attention import packed_attention
from mansard.training.linear_product import Product, plain_type, product, weight_gradient

ROTARY = frozenset({"LlamaAttention", "MistralAttention", "Qwen2Attention"})
"""transformers' classes that compute what Attention does, where they have no biases."""
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")


def is_rotary(module: nn.Module) -> bool:
    """Whether Attention computes what `module` does."""
    if type(module).__name__ not in ROTARY or module.config._attn_implementation != PACKED:
        return False
    return plain_type(module, *LINEARS) is not None


class Attention(nn.Module):
    """Rotary self-attention over packed rows; its four linears keep their names."""

    def __init__(self, attention: Any) -> None:  # noqa: ANN401 - one that `is_rotary`
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = attention.q_proj, attention.k_proj, attention.v_proj
        self.o_proj = attention.o_proj
        self.products = plain_type(attention, *LINEARS)
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
        query, key, value = _QueryKeyValue.apply(hidden_states, *weights, *position_embeddings, self.products)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        others |= {"scaling": self.scaling, "dropout": self.dropout if self.training else 0.0}
        mixed, _ = packed_attention(self, query, key, value, attention_mask, **others)
        output_MK: torch.Tensor = Product.apply(mixed.flatten(0, 1).flatten(1), self.o_proj.weight, self.products)
        return output_MK.view_as(hidden_states), None


class _QueryKeyValue(torch.autograd.Function):
    """Query, key and value states [B, heads, T, D] by products in `dtype`, the first two rotated by their positions."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        x_BTK: torch.Tensor,
        query_NK: torch.Tensor,
        key_NK: torch.Tensor,
        value_NK: torch.Tensor,
        cosine_BTD: torch.Tensor,
        sine_BTD: torch.Tensor,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, ...]:
        (rows, tokens, _), width = x_BTK.shape, cosine_BTD.shape[-1]
        x_MK, weights = x_BTK.flatten(0, 1).to(dtype), (query_NK, key_NK, value_NK)
        query, key, value = (
            product(x_MK, weight.to(dtype)).to(x_BTK.dtype).view(rows, tokens, -1, width).transpose(1, 2)
            for weight in weights
        )
        kept = (x_MK,) if any(ctx.needs_input_grad[1:4]) else ()
        ctx.dtype = dtype
        ctx.save_for_backward(*weights, cosine_BTD, sine_BTD, *kept)
        turned = [_turned(x, cosine_BTD, sine_BTD, torch.empty_like(x, memory_format=torch.contiguous_format), 1)
                  for x in (query, key)]  # fmt: skip
        return *turned, value

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        query_NK, key_NK, value_NK, cosine_BTD, sine_BTD, *kept = ctx.saved_tensors
        (rows, _, tokens, width), dtype = grads[0].shape, ctx.dtype
        grads_MN = []
        for grad in grads[:2]:
            flat = grad.new_empty(rows, tokens, grad.shape[1], width)
            _turned(grad, cosine_BTD, sine_BTD, flat.transpose(1, 2), -1)
            grads_MN.append(flat.view(rows * tokens, -1).to(dtype))
        grads_MN.append(grads[2].transpose(1, 2).reshape(rows * tokens, -1).to(dtype))
        weights = [weight_NK.to(dtype).t() for weight_NK in (query_NK, key_NK, value_NK)]
        to_x_MK = product(grads_MN[0], weights[0])
        to_x_MK.add_(product(grads_MN[1], weights[1])).add_(product(grads_MN[2], weights[2]))
        to_weights = [weight_gradient(grad_MN, kept[0]) if kept else None for grad_MN in grads_MN]
        return to_x_MK.to(grads[0].dtype).view(rows, tokens, -1), *to_weights, None, None, None


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
