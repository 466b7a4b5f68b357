"""Matrix products of a training in float32 on a CPU: oneDNN's, which reach 110 GFLOP/s where MKL's reach 100.

(1,024 tokens, widths of 128 to 768, one core of a Zen 4, 2026-11-26; weights packed ahead are no faster there.)
Products in other types and elsewhere are torch's. Legend: M tokens, K inputs, N outputs.
"""

import torch
from torch import nn
from torch.nn.functional import linear

HAS_ONEDNN = torch.backends.mkldnn.is_available()


def product(x_MK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    """x @ weight.T, [M, N]; records no gradient."""
    if HAS_ONEDNN and x_MK.dtype == torch.float32 and x_MK.device.type == "cpu":
        made: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_MK, weight_NK, None, "none", [], "")
        return made
    return linear(x_MK, weight_NK)


def are_plain(module: nn.Module, *names: str) -> bool:
    """Whether these of a module's children are linears as torch has them, without biases."""
    linears = [getattr(module, name) for name in names]
    return all(type(linear) is nn.Linear and linear.bias is None for linear in linears)
