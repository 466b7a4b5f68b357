"""The memory that training expects, said before the first step (an estimate, not a bound), and what it then took."""

import resource
from typing import Any

import torch

from mansard.training.optimizer import Group

ACTIVATIONS_PER_HIDDEN = 16
"""Values kept for backward in a decoder block, in units of the hidden width (norms, q, k, v, attention, residuals)."""

ACTIVATIONS_PER_INTERMEDIATE = 4
"""The same in units of the MLP's width (gate, up, activation, product)."""


def expected_bytes(model: Any, groups: list[Group], batch_sequences: int, row_tokens: int) -> int:  # noqa: ANN401
    """Weights, gradients, masters, moments, activations of the trained blocks and logits."""
    config = model.config
    itemsize: int = model.dtype.itemsize
    weights: int = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = [p for g in groups for p in g.parameters.values()]
    optimizer: int = sum(p.numel() * (p.element_size() + 8 + (0 if p.element_size() == 4 else 4)) for p in trained)
    tokens = batch_sequences * row_tokens
    kept: int = ACTIVATIONS_PER_HIDDEN * config.hidden_size + ACTIVATIONS_PER_INTERMEDIATE * config.intermediate_size
    activations: int = tokens * kept * itemsize * config.num_hidden_layers
    logits: int = tokens * config.vocab_size * (2 * itemsize + 8)
    mask: int = tokens * row_tokens * itemsize
    return weights + optimizer + activations + logits + mask


def peak_gib() -> float:
    """What the accelerator reserved at most, or else this process's largest resident size, libraries included."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_reserved()) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
