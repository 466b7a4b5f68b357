"""A block of a branch: Llama's, with its products' gradients summed where they lie.

Legend: B rows, T tokens, d branch width, H heads, K head width, S keys.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from mansard.carry_on.products import product
from mansard.composition.shape import BranchShape

Keep = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Takes block number, new keys and values [B, H, T, K]; gives all keys and values so far [B, H, S, K] (a KV cache)."""


def rotation_of(
    shape: BranchShape, positions_BT: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cosine, sine) [B, 1, T, K / 2] of rotary positions (Su et al., 2021), computed in float32."""
    half = shape.head_width // 2
    powers = torch.arange(half, dtype=torch.float32, device=positions_BT.device) / half
    angles = positions_BT[:, None, :, None].float() * shape.rope_theta**-powers
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(heads_BHTK: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """The first half of each head paired with the second (NeoX order, as vLLM's get_rope)."""
    first, second = heads_BHTK.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


def norm(h_BTd: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return rms_norm(h_BTd, weight.shape, weight, epsilon)


def apart(
    qkv_BT3HK: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys, rotated, and values, [B, H, T, K] each."""
    q, k, v = qkv_BT3HK.permute(2, 0, 3, 1, 4)
    return rotate(q, cosine, sine), rotate(k, cosine, sine), v


def gated(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a block does between its products. Training on a GPU compiles them; what reads rows of any length does not.
    """

    norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] = norm
    apart: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]] = apart
    gated: Callable[[torch.Tensor], torch.Tensor] = gated


PIECES = Pieces()


def matrix(rows: int, columns: int) -> nn.Parameter:
    """To be filled."""
    return nn.Parameter(torch.empty(rows, columns))


class Block(nn.Module):  # type: ignore[misc]
    """A Llama block: pre-norm attention with rotary positions, pre-norm gated MLP."""

    def __init__(self, shape: BranchShape) -> None:
        super().__init__()
        wide = shape.heads * shape.head_width
        self.shape = shape
        self.pieces = PIECES
        self.attention_norm = nn.Parameter(torch.ones(shape.width))
        self.qkv = matrix(3 * wide, shape.width)
        self.attention_output = matrix(shape.width, wide)
        self.mlp_norm = nn.Parameter(torch.ones(shape.width))
        self.gate_up = matrix(2 * shape.intermediate, shape.width)
        self.down = matrix(shape.width, shape.intermediate)

    def forward(
        self,
        h_BTd: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
        keep: Keep | None,
        number: int,
    ) -> torch.Tensor:
        shape, (rows, tokens, _) = self.shape, h_BTd.shape
        qkv = product(self.pieces.norm(h_BTd, self.attention_norm, shape.norm_epsilon), self.qkv)
        q, k, v = self.pieces.apart(qkv.view(rows, tokens, 3, shape.heads, shape.head_width), *rotation)
        if keep is not None:
            k, v = keep(number, k, v)
        mixed_BHTK = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        h_BTd = h_BTd + product(mixed_BHTK.transpose(1, 2).flatten(2), self.attention_output)
        gate_up = product(self.pieces.norm(h_BTd, self.mlp_norm, shape.norm_epsilon), self.gate_up)
        return h_BTd + product(self.pieces.gated(gate_up), self.down)
