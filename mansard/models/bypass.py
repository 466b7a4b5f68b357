"""Decoder blocks passed by: the model without some of its blocks, on the same weights.

A block that is passed by hands on the states it was given, so the residual stream goes past it; the block itself is not
called and stays what it is (compiled, hooked, on whatever device). B rows, T tokens, H hidden width.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class _PassedBy(nn.Module):  # type: ignore[misc]
    """Stands where a block was. The decoder may ask what kind of attention the block has."""

    def __init__(self, block: nn.Module, states_BTH: torch.Tensor | None) -> None:
        super().__init__()
        self.attention_type = getattr(block, "attention_type", None)
        self._states_BTH = states_BTH

    def forward(self, states_BTH: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:  # noqa: ANN401 - what a block takes
        return states_BTH if self._states_BTH is None else self._states_BTH


@contextmanager
def bypassed(layers: nn.ModuleList, indices: Collection[int], states_BTH: torch.Tensor | None = None) -> Iterator[None]:
    """These of a decoder's `layers` hand on what they get while the context lasts, or `states_BTH` where it is given
    (so that a pass may begin above them with states that are known)."""
    blocks = {index: layers[index] for index in indices}
    try:
        for index, block in blocks.items():
            layers[index] = _PassedBy(block, states_BTH)
        yield
    finally:
        for index, block in blocks.items():
            layers[index] = block
