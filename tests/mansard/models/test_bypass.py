"""A decoder without some of its blocks, on a very small Llama."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mansard.models.bypass import bypassed
from mansard.models.loading import load_model


def test_blocks_are_passed_by_and_are_back_whatever_happens(make_family: Callable[..., Path]) -> None:
    model = load_model(make_family("llama"), torch.float32)
    layers, ids_BT = model.model.layers, torch.arange(24).view(2, 12)
    blocks, states = list(layers), []

    def answer() -> torch.Tensor:
        with torch.no_grad():
            logits_BTV: torch.Tensor = model(input_ids=ids_BT, use_cache=False).logits
        return logits_BTV

    hook = blocks[2].register_forward_pre_hook(lambda _, positional: states.append(positional[0]))
    whole_BTV = answer()
    hook.remove()
    with bypassed(layers, (1,)):
        without_BTV = answer()
    with bypassed(layers, range(2), states[0]):
        assert torch.equal(answer(), whole_BTV), "a pass may begin above the blocks whose result is known"
    with pytest.raises(ZeroDivisionError), bypassed(layers, range(3)):
        raise ZeroDivisionError
    assert list(layers) == blocks and torch.equal(answer(), whole_BTV)
    del layers[1]
    assert torch.equal(answer(), without_BTV) and not torch.equal(without_BTV, whole_BTV)
