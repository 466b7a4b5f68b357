"""Decoder blocks on a CPU in float32: norms, gated MLPs and attention, each as one or two operations. Products of a
block's linears are in float32 or bf16 (linear_product.py), and so is what a gated MLP does between them.

Backward is written out: it works in place, and what is frozen keeps no input and gets no gradient. Parameters keep
their names. Does not cover other families' modules, biases, or linears that something else has replaced: those stay as
they are. Legend: M tokens, K inputs, I inner width.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import silu

from mansard.training.cpu_attention import Attention, is_rotary
from mansard.training.frozen_mlp import GATED, SILU
from mansard.training.linear_product import plain_type, product, weight_gradient

NORMS = frozenset({"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"})
"""transformers' classes that compute what Norm does."""
LINEARS = ("gate_proj", "up_proj", "down_proj")


def speed_up(decoder: nn.Module) -> None:
    """Put this file's modules in the place of those they compute the same as, in `decoder` (modified)."""
    for module in list(decoder.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ in NORMS:
                setattr(module, name, Norm(child))
            elif is_gated(child):
                setattr(module, name, GatedMLP(child))
            elif is_rotary(child):
                setattr(module, name, Attention(child))


def is_gated(module: nn.Module) -> bool:
    """Whether GatedMLP computes what `module` does."""
    if type(module).__name__ not in GATED or type(getattr(module, "act_fn", None)).__name__ not in SILU:
        return False
    return plain_type(module, *LINEARS) is not None


class Norm(nn.Module):
    """Root mean square norm, as in Llama."""

    def __init__(self, norm: Any) -> None:  # noqa: ANN401 - a module of transformers
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = _Norm.apply(states, self.weight, self.variance_epsilon)
        return normed


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight_K: torch.Tensor, epsilon: float) -> torch.Tensor:  # noqa: ANN401
        scale = torch.linalg.vecdot(states, states).div_(states.shape[-1]).add_(epsilon).rsqrt_().unsqueeze(-1)
        scaled = states * scale
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(scaled, scale, weight_K)
        return scaled * weight_K

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        scaled, scale, weight_K = ctx.saved_tensors
        along = grad * scaled
        to_weight_K = along.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, to_weight_K, None
        share = torch.matmul(along, weight_K).div_(-grad.shape[-1]).unsqueeze(-1)
        return (grad * weight_K).addcmul_(scaled, share).mul_(scale), to_weight_K, None


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)); its three linears keep their names."""

    def __init__(self, mlp: Any) -> None:  # noqa: ANN401 - one that `is_gated`
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.products = plain_type(mlp, *LINEARS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = (self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
        output_MK: torch.Tensor = _GatedMLP.apply(x.flatten(0, -2), *weights, self.products)
        return output_MK.view_as(x)


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        x_MK: torch.Tensor,
        gate_IK: torch.Tensor,
        up_IK: torch.Tensor,
        down_KI: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        given, x_MK = x_MK.dtype, x_MK.to(dtype)
        gate_MI, up_MI = product(x_MK, gate_IK.to(dtype)), product(x_MK, up_IK.to(dtype))
        gated_MI = silu(gate_MI).mul_(up_MI)
        if any(ctx.needs_input_grad):
            trains = any(ctx.needs_input_grad[1:])
            ctx.save_for_backward(gate_IK, up_IK, down_KI, gate_MI, up_MI, *((x_MK, gated_MI) if trains else ()))
        ctx.dtype = dtype
        return product(gated_MI, down_KI.to(dtype)).to(given)

    @staticmethod
    def backward(ctx: Any, grad_MK: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        gate_IK, up_IK, down_KI, gate_MI, up_MI, *kept = ctx.saved_tensors
        given, grad_MK = grad_MK.dtype, grad_MK.to(ctx.dtype)
        gate_IK, up_IK, down_KI = (weight.to(ctx.dtype) for weight in (gate_IK, up_IK, down_KI))
        grad_MI = product(grad_MK, down_KI.t())
        to_up_MI = silu(gate_MI).mul_(grad_MI)
        to_gate_MI = torch.ops.aten.silu_backward(grad_MI.mul_(up_MI), gate_MI)
        to_x_MK = product(to_gate_MI, gate_IK.t()).add_(product(to_up_MI, up_IK.t())).to(given)
        if not kept:
            return to_x_MK, None, None, None, None
        x_MK, gated_MI = kept
        to_gate_IK, to_up_IK = weight_gradient(to_gate_MI, x_MK), weight_gradient(to_up_MI, x_MK)
        return to_x_MK, to_gate_IK, to_up_IK, weight_gradient(grad_MK, gated_MI), None
