"""What keeps a training near the base on general text: how far the model is from the base, and the gradient of that.

The base is the same model with its new blocks passed by, so there is no second copy of it. Legend: N tokens of general
text, C of a chunk of them, H hidden width, V vocabulary. Source: Control LLM (arXiv 2501.10979).
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from mansard.training.head_loss import HeadLoss


@dataclass(frozen=True, slots=True)
class Anchor:
    """`kind` and `weight` as in `specs.Anchor`; `new_blocks` are what the base has not."""

    kind: str
    weight: float
    new_blocks: Collection[int]

    def drift(
        self, head: HeadLoss, here_NH: torch.Tensor, base_NH: torch.Tensor, is_label_N: torch.Tensor
    ) -> torch.Tensor:
        """Summed over the tokens that predict something: a float32 scalar."""
        if self.kind == "kl":
            return head.divergence(base_NH, here_NH, is_label_N)
        apart_N = (here_NH.float() - base_NH.float()).square().sum(-1)
        return (apart_N / base_NH.float().square().sum(-1) * is_label_N).sum()
