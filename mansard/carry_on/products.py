"""Products whose weights' gradients are summed where they lie.

Autograd would make a gradient, as large as its weight, and add it; where a gradient is there already (the engine lends
memory for them) the product is summed into it at once. That spares the training node its largest passing tensors and a
pass over all gradients per micro-batch.
"""

from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


class _Product(torch.autograd.Function):  # type: ignore[misc]
    """x W^T; x [..., in], W [out, in]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 - torch's context
        ctx.save_for_backward(x)
        ctx.weight = weight  # itself, not what a checkpoint makes of it: its gradient hangs on it
        return linear(x, weight)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # noqa: ANN401
        (x,), weight = ctx.saved_tensors, ctx.weight
        slope_x = slope @ weight if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return slope_x, None
        slope_NO, x_NI = slope.flatten(0, -2), x.flatten(0, -2)
        if weight.grad is None:
            return slope_x, slope_NO.T @ x_NI
        weight.grad.addmm_(slope_NO.T, x_NI)
        return slope_x, None


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T as torch's linear; backward adds to `weight.grad` where that is there."""
    return cast(torch.Tensor, _Product.apply(x, weight))
