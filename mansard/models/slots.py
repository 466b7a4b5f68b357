"""A checkpoint's tensor inside the parameter that transformers holds it in: a view, exact both ways."""

import torch

from mansard.models.families import Slot


def view(parameter: torch.Tensor, slot: Slot) -> torch.Tensor:
    """The rows of `parameter` (or of anything of its shape) that are the checkpoint's tensor."""
    if slot.expert is None:
        return parameter
    rows = parameter[slot.expert]
    height = rows.shape[0] // slot.parts
    return rows[slot.part * height : (slot.part + 1) * height]
