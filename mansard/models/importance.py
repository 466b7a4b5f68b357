"""What each decoder block is worth to a text: the loss that the model gains when the block is left out.

A block is left out exactly (bypass.py). Blocks below it are not computed again: the states that reach a block are kept
from the whole model's pass, so that one block costs on average half a forward pass. One CPU thread, because sums over
another number of threads round differently.

Shapes: B rows, T tokens, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from mansard.models.attention_kernels import attention_by
from mansard.models.bypass import bypassed
from mansard.models.probe import one_thread


def losses(
    model: Any,  # noqa: ANN401 - a transformers model
    ids_BT: torch.Tensor,
    kernel: str,
    told: Callable[[int], None] = lambda block: None,
) -> tuple[float, list[float]]:
    """Summed nats of the B * (T - 1) next tokens: of the model, and of the model without each of its blocks."""
    layers = model.get_decoder().layers
    without = []
    with torch.inference_mode(), one_thread(), attention_by(kernel, model.device):
        with _entering(layers) as states:
            whole = _nats(model, ids_BT)
        for index in range(len(layers)):
            with bypassed(layers, range(index + 1), states[index]):
                without.append(_nats(model, ids_BT))
            told(index)
    return whole, without


def _nats(model: Any, ids_BT: torch.Tensor) -> float:  # noqa: ANN401 - a transformers model
    logits_BTV = model(input_ids=ids_BT.to(model.device), use_cache=False).logits
    targets = ids_BT[:, 1:].flatten().to(logits_BTV.device)
    return float(cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), targets, reduction="none").double().sum())


@contextmanager
def _entering(blocks: Iterable[Any]) -> Iterator[list[torch.Tensor]]:
    """The states with which each block is called while the context lasts, in order."""
    states: list[torch.Tensor] = []
    hooks = [b.register_forward_pre_hook(lambda _, positional: states.append(positional[0])) for b in blocks]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()
