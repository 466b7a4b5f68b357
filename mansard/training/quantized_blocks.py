"""Which modules of a decoder's blocks become FP8: linears, and gated MLPs of three frozen ones as a whole."""

from torch import nn

from mansard.training.frozen_linear import MULTIPLE, FrozenLinear, TrainedLinear
from mansard.training.frozen_mlp import FrozenMLP, is_frozen_gated


def quantize_linears(blocks: nn.Module, new_blocks_too: bool) -> None:
    """Put FP8 linears in the place of those in `blocks` (modified): all whose weight is frozen, with `new_blocks_too`
    also those that train. Those with a size that is not a multiple of 16 are left."""
    for module in list(blocks.modules()):
        for name, child in list(module.named_children()):
            if type(child) is not nn.Linear or (child.weight.requires_grad and not new_blocks_too):
                continue
            if child.in_features % MULTIPLE == 0 and child.out_features % MULTIPLE == 0:
                setattr(module, name, TrainedLinear(child) if child.weight.requires_grad else FrozenLinear(child))
    for module in list(blocks.modules()):
        for name, child in list(module.named_children()):
            if is_frozen_gated(child):
                setattr(module, name, FrozenMLP(child))
