"""Products of a linear on a CPU, and linears in float32 whose products are taken in bf16 (`frozen: bf16`).

oneDNN reaches 110 GFLOP/s in float32 where MKL reaches 100, and 215 in bf16 (1,024 tokens, widths of 128 to 768, one
core of a Zen 4, 2026-11-26; weights packed ahead are no faster there). A base in bf16 loses nothing when its weights
are taken in bf16 again; inputs, outputs and gradients are rounded, sums and what trains stay in float32. Products
elsewhere are torch's. Legend: M tokens, K inputs, N outputs.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

HAS_ONEDNN = torch.backends.mkldnn.is_available()
HAS_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Whether this CPU has vector or matrix units for it (AVX-512 at the least); without them it is slow."""


def product(x_MK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    """x @ weight.T, [M, N], of one type; records no gradient."""
    is_ours = x_MK.dtype == torch.float32 or (x_MK.dtype == torch.bfloat16 and HAS_BF16)
    if HAS_ONEDNN and is_ours and x_MK.device.type == "cpu":
        made: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_MK, weight_NK, None, "none", [], "")
        return made
    return linear(x_MK, weight_NK)


class Product(torch.autograd.Function):
    """x @ weight.T with its product and its gradients in `dtype`, [M, N] in x's; what is frozen keeps no input."""

    @staticmethod
    def forward(ctx: Any, x_MK: torch.Tensor, weight_NK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:  # noqa: ANN401
        short_MK, short_NK = x_MK.to(dtype), weight_NK.to(dtype)
        ctx.save_for_backward(short_NK, *((short_MK,) if ctx.needs_input_grad[1] else ()))
        return product(short_MK, short_NK).to(x_MK.dtype)

    @staticmethod
    def backward(ctx: Any, grad_MN: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401 - autograd's
        short_NK, *kept = ctx.saved_tensors
        short_MN = grad_MN.to(short_NK.dtype)
        to_weight_NK = (short_MN.t() @ kept[0]).to(grad_MN.dtype) if kept else None
        return product(short_MN, short_NK.t()).to(grad_MN.dtype), to_weight_NK, None


class Bf16Linear(nn.Linear):
    """A linear that takes its products in bf16; weight and bias are those of the one it is made of."""

    def __init__(self, of: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = of.in_features, of.out_features
        self.weight, self.bias = of.weight, of.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output_MN: torch.Tensor = Product.apply(x.flatten(0, -2), self.weight, torch.bfloat16)
        output = output_MN.view(*x.shape[:-1], -1)
        return output if self.bias is None else output + self.bias


def shorten(module: nn.Module, frozen: bool, trained: bool) -> None:
    """Put `Bf16Linear`s in the place of the linears below `module` (modified): those whose weight is frozen, and those
    that train."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and (trained if child.weight.requires_grad else frozen):
                setattr(parent, name, Bf16Linear(child))


def plain_type(module: nn.Module, *names: str) -> torch.dtype | None:
    """The type in which all of these children take their products; None where one is no plain linear or has a bias."""
    linears = [getattr(module, name) for name in names]
    kinds = {type(linear) for linear in linears}
    if len(kinds) > 1 or not kinds <= {nn.Linear, Bf16Linear} or any(linear.bias is not None for linear in linears):
        return None
    return torch.bfloat16 if kinds == {Bf16Linear} else linears[0].weight.dtype
