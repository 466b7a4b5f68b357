"""Linears whose frozen weight is held in 4 bits (NF4, QLoRA: Dettmers et al. 2023, arXiv 2305.14314, section 3).

torchao quantizes; what it made is held as plain buffers, so that digests, devices and DeepSpeed meet nothing unusual. A
weight is made whole for the moment of a product, forward and backward; nothing is kept of it or of the input. torchao
on every device, because its NF4 is plain tensor arithmetic: a CPU's tests run what a GPU runs (its int4 kernels have no
input gradient, and bitsandbytes would be one more library). Legend: M tokens, K inputs, N outputs.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torchao.quantization import NF4Tensor

BLOCK = 64
"""Values that share a scale, as in the paper."""
SCALES = 256
"""Scales that are quantized together, as in the paper; fewer where a weight has not so many."""
PARTS = ("quantized_data", "quantized_scalers", "quantization_factor", "scaler_mean", "nf4")


class FourBitLinear(nn.Module):
    """A linear whose weight never moves: five buffers `weight_...`, about 4.13 bits a value; a bias stays."""

    def __init__(self, linear: nn.Linear, device: torch.device) -> None:
        super().__init__()
        weight_NK = linear.weight.detach().to(device)
        made = NF4Tensor.from_tensor(weight_NK, BLOCK, math.gcd(SCALES, weight_NK.numel() // BLOCK))
        for part in PARTS:
            # Of its own: some are views of one value of many.
            self.register_buffer(f"weight_{part}", getattr(made, part).clone(memory_format=torch.contiguous_format))
        self.quantized_values: int = weight_NK.numel()
        self.outputs: int = linear.out_features
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [getattr(self, f"weight_{part}") for part in PARTS]
        product_MN: torch.Tensor = _product(x.flatten(0, -2), *parts, self.outputs)
        product = product_MN.view(*x.shape[:-1], self.outputs)
        return product if self.bias is None else product + self.bias

    def dequantized(self) -> torch.Tensor:
        """The weight [N, K] that products take, in the type of the linear that was quantized."""
        return _whole([getattr(self, f"weight_{part}") for part in PARTS], self.outputs)


def hold_in_four_bits(blocks: nn.Module, device: torch.device) -> None:
    """Put 4-bit linears on `device` in the place of those in `blocks` (modified) whose weight is frozen. Those with a
    size that is no multiple of 64 are left."""
    for module in list(blocks.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and not child.weight.requires_grad and child.weight.numel() % BLOCK == 0:
                setattr(module, name, FourBitLinear(child, device))


def _whole(parts: Sequence[torch.Tensor], outputs: int) -> torch.Tensor:
    """[N, K] in the type of its table: the values of torchao's NF4Tensor.get_original_weight, a byte's two at once."""
    data, scalers, factor, mean, table = parts
    scales = ((scalers.view(factor.numel(), -1) / factor.unsqueeze(-1)).to(table.dtype) + mean).view(-1, 1, 1)
    pairs = torch.stack([table.repeat_interleave(len(table)), table.repeat(len(table))], dim=-1)
    return (pairs[data.int()].view(scales.shape[0], -1, 2) * scales).view(outputs, -1)


@torch.library.custom_op("mansard::four_bit_product", mutates_args=())
def _product(
    x_MK: torch.Tensor,
    data: torch.Tensor,
    scalers: torch.Tensor,
    factor: torch.Tensor,
    mean: torch.Tensor,
    table: torch.Tensor,
    outputs: int,
) -> torch.Tensor:
    """x @ weight.T, [M, N]. An operator for the reason of `frozen_product` in frozen_linear.py."""
    return x_MK @ _whole((data, scalers, factor, mean, table), outputs).t()


@_product.register_fake
def _(x_MK: Any, data: Any, scalers: Any, factor: Any, mean: Any, table: Any, outputs: int) -> torch.Tensor:  # noqa: ANN401
    return x_MK.new_empty(x_MK.shape[0], outputs)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ANN401 - autograd's
    ctx.save_for_backward(*inputs[1:6])
    ctx.outputs = inputs[6]


def _backward(ctx: Any, grad_MN: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
    return grad_MN @ _whole(ctx.saved_tensors, ctx.outputs), None, None, None, None, None, None


_product.register_autograd(_backward, setup_context=_keep)
