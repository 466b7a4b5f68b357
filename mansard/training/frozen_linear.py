"""Linears in FP8: a frozen weight is quantized once and serves the forward pass and the input's gradient.

FP8 is e4m3 with one float32 scale a row: a token's for activations and gradients, an output's for weights. A frozen
weight is held once, [N, K]: the gradient's product contracts over its outputs, so there the outputs' scales go into the
gradient before that is quantized, and the weight is transposed on the fly. It needs no weight gradient, so nothing of
the input is kept. A weight that trains is quantized again at every use; its own gradient is computed in the
parameter's type. On a device without FP8 matrix units the same arithmetic runs in float32 (the reference; slow).
Legend: M tokens, K inputs, N outputs. Does not cover experts, which transformers holds in one parameter.
"""

from typing import Any

import torch
from torch import nn

from mansard.errors import BadInput

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
SMALLEST_ROW = 1e-12
"""A row whose largest value is below this is quantized as if that were its largest (rows of zeros stay zeros)."""
MULTIPLE = 16
"""FP8 matrix units take sizes that are multiples of this; other linears stay as they are."""


def require_fp8(device: torch.device) -> None:
    """BadInput where `device` has no FP8 matrix units, with the reason."""
    if device.type != "cuda":
        reason = f"a {device.type.upper()}, which has none"
    elif torch.cuda.get_device_capability(device) >= (8, 9):
        return
    else:
        major, minor = torch.cuda.get_device_capability(device)
        reason = f"{torch.cuda.get_device_name(device)} with compute capability {major}.{minor}, below 8.9"
    raise BadInput(f"train.frozen: fp8 needs FP8 matrix units, and this is {reason}; use frozen: bf16")


def quantize_rows(x_MK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values [M, K] in FP8, scales [M, 1] in float32): x = value * scale; a row's largest takes FP8's largest."""
    largest_M1 = x_MK.abs().amax(dim=-1, keepdim=True).float().clamp(min=SMALLEST_ROW)
    # No value rounds past FP8's largest: the next one up would be 480, and above 464 first.
    return (x_MK.float() * (LARGEST / largest_M1)).to(FP8), largest_M1 / LARGEST


def scaled_product(
    a_MK: torch.Tensor, scale_M1: torch.Tensor, b_KN: torch.Tensor, scale_1N: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """(a * scale) @ (b * scale) of FP8 values, [M, N] in `dtype`; `b_KN` is column-major on an accelerator."""
    if a_MK.is_cuda:
        product = torch._scaled_mm(
            a_MK, b_KN, scale_a=scale_M1, scale_b=scale_1N, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return product.to(dtype)
    return (a_MK.float() @ b_KN.float() * scale_M1 * scale_1N).to(dtype)


def input_gradient(grad_MN: torch.Tensor, weight_NK: torch.Tensor, scale_N1: torch.Tensor) -> torch.Tensor:
    """Gradient [M, K] of the input of x @ (weight * scale).T."""
    return product_with(*quantize_rows(grad_MN.float() * scale_N1.t()), weight_NK, grad_MN.dtype)


def product_with(
    values_MN: torch.Tensor, scale_M1: torch.Tensor, weight_NK: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """(values * scale) @ weight, [M, K] in `dtype`, of FP8 values; the weight is transposed on the fly."""
    ones_1K = torch.ones(1, weight_NK.shape[1], dtype=torch.float32, device=values_MN.device)
    columns_NK = weight_NK.view(torch.uint8).t().contiguous().view(FP8).t()
    return scaled_product(values_MN, scale_M1, columns_NK, ones_1K, dtype)


@torch.library.custom_op("mansard::frozen_product", mutates_args=())
def _frozen_product(
    x_MK: torch.Tensor,
    values_MK: torch.Tensor,
    scale_M1: torch.Tensor,
    weight_NK: torch.Tensor,
    scale_N1: torch.Tensor,
) -> torch.Tensor:
    """x @ (weight * scale).T, [M, N]; `values_MK` and `scale_M1` are x quantized, x itself is there for its gradient.

    An operator and not an autograd.Function: compiled, three of those on one input lost the gradient of an attention
    behind them (torch 2.11, H200, 2026-11-25).
    """
    return scaled_product(values_MK, scale_M1, weight_NK.t(), scale_N1.t(), x_MK.dtype)


@torch.library.custom_op("mansard::trained_product", mutates_args=())
def _trained_product(
    x_MK: torch.Tensor,
    weight_NK: torch.Tensor,
    values_MK: torch.Tensor,
    scale_M1: torch.Tensor,
    values_NK: torch.Tensor,
    scale_N1: torch.Tensor,
) -> torch.Tensor:
    """The same for a weight that trains, given plain and quantized."""
    return scaled_product(values_MK, scale_M1, values_NK.t(), scale_N1.t(), x_MK.dtype)


@_frozen_product.register_fake
def _(x_MK: Any, values_MK: Any, scale_M1: Any, weight_NK: Any, scale_N1: Any) -> torch.Tensor:  # noqa: ANN401
    return x_MK.new_empty(x_MK.shape[0], weight_NK.shape[0])


@_trained_product.register_fake
def _(x_MK: Any, weight_NK: Any, values_MK: Any, scale_M1: Any, values_NK: Any, scale_N1: Any) -> torch.Tensor:  # noqa: ANN401
    return x_MK.new_empty(x_MK.shape[0], weight_NK.shape[0])


def _keep_frozen(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:  # noqa: ANN401 - autograd's
    ctx.save_for_backward(inputs[3], inputs[4])


def _frozen_backward(ctx: Any, grad_MN: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
    return input_gradient(grad_MN, *ctx.saved_tensors), None, None, None, None


def _keep_trained(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:  # noqa: ANN401
    ctx.save_for_backward(inputs[0], inputs[1])


def _trained_backward(ctx: Any, grad_MN: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
    x_MK, weight_NK = ctx.saved_tensors
    grad_MK = input_gradient(grad_MN, *quantize_rows(weight_NK)) if ctx.needs_input_grad[0] else None
    return grad_MK, grad_MN.t() @ x_MK, None, None, None, None


_frozen_product.register_autograd(_frozen_backward, setup_context=_keep_frozen)
_trained_product.register_autograd(_trained_backward, setup_context=_keep_trained)


class FrozenLinear(nn.Module):
    """A linear whose weight never moves: buffers `weight_fp8` [N, K] and `weight_scale` [N, 1]; a bias stays."""

    weight_fp8: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        values_NK, scale_N1 = quantize_rows(linear.weight.detach())
        self.register_buffer("weight_fp8", values_NK)
        self.register_buffer("weight_scale", scale_N1)
        self.quantized_values: int = values_NK.numel()
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_MK = x.flatten(0, -2)
        product_MN = _frozen_product(x_MK, *quantize_rows(x_MK.detach()), self.weight_fp8, self.weight_scale)
        return _shaped(product_MN, x, self.bias)


class TrainedLinear(nn.Module):
    """A linear that trains, whose forward pass and input gradient are FP8; its parameters keep their names."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_MK = x.flatten(0, -2)
        quantized = (*quantize_rows(x_MK.detach()), *quantize_rows(self.weight.detach()))
        return _shaped(_trained_product(x_MK, self.weight, *quantized), x, self.bias)


def _shaped(product_MN: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product = product_MN.view(*x.shape[:-1], product_MN.shape[-1])
    return product if bias is None else product + bias
