"""Products of a linear on a CPU, and linears in float32 with products in bf16 (`frozen: bf16`, `new_blocks: bf16`).

oneDNN reaches 110 GFLOP/s in float32 where MKL reaches 100, and 215 in bf16 (1,024 tokens, widths of 128 to 768, one
core of a Zen 4, 2026-11-26; weights packed ahead are no faster there). A base in bf16 loses nothing when its weights
are taken in bf16 again. In bf16 are a product's inputs, its output and its gradients, and what a gated MLP does between
its products; in float32 are parameters and their gradients' sums, the residual stream, norms and softmax. Attention's
own products are in bf16 where cpu_attention.py computes them (Llama's kind without biases, in one process, on a CPU
with bf16 units). Products elsewhere are torch's. Legend: M tokens, K inputs, N outputs.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

HAS_ONEDNN = torch.backends.mkldnn.is_available()
HAS_BF16 = HAS_ONEDNN and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
"""Whether this CPU has units for it. Without them bf16 takes ten times as long as float32, so rounded values are
multiplied in float32."""


def product(x_MK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    """x @ weight.T, [M, N], of one type; records no gradient."""
    if x_MK.device.type != "cpu" or x_MK.dtype not in (torch.float32, torch.bfloat16):
        return linear(x_MK, weight_NK)
    if x_MK.dtype == torch.bfloat16 and not HAS_BF16:
        return product(x_MK.float(), weight_NK.float()).to(torch.bfloat16)
    if not HAS_ONEDNN:
        return linear(x_MK, weight_NK)
    made: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_MK, weight_NK, None, "none", [], "")
    return made


def weight_gradient(grad_MN: torch.Tensor, x_MK: torch.Tensor) -> torch.Tensor:
    """Gradient [N, K] in float32 of the weight of x @ weight.T, by a product in the type of both."""
    if x_MK.dtype == torch.bfloat16 and x_MK.device.type == "cpu" and not HAS_BF16:
        grad_MN, x_MK = grad_MN.float(), x_MK.float()
    return (grad_MN.t() @ x_MK).float()


class Product(torch.autograd.Function):
    """x @ weight.T with its product and its gradients in `dtype`, [M, N] in x's; what is frozen keeps no input. A
    weight is rounded again in backward, so that no copy of it is kept."""

    @staticmethod
    def forward(ctx: Any, x_MK: torch.Tensor, weight_NK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:  # noqa: ANN401
        short_MK = x_MK.to(dtype)
        ctx.dtype = dtype
        ctx.save_for_backward(weight_NK, *((short_MK,) if ctx.needs_input_grad[1] else ()))
        return product(short_MK, weight_NK.to(dtype)).to(x_MK.dtype)

    @staticmethod
    def backward(ctx: Any, grad_MN: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401 - autograd's
        weight_NK, *kept = ctx.saved_tensors
        short_MN = grad_MN.to(ctx.dtype)
        to_x_MK = product(short_MN, weight_NK.to(ctx.dtype).t()).to(grad_MN.dtype) if ctx.needs_input_grad[0] else None
        return to_x_MK, weight_gradient(short_MN, kept[0]) if kept else None, None


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
