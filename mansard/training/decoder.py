"""A model's decoder blocks as training runs them: compiled on an accelerator, some of them recomputed in backward.

Autograd records nothing below the lowest trained block, because nothing there needs a gradient; a block above it either
keeps its activations or keeps its input alone and computes them again (non-reentrant checkpointing, torch's). Blocks
are compiled one by one, so that all of one kind share a compilation. A CPU compiles nothing: that would cost a small
training more than it gives, and needs a C++ compiler.
"""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

COMPILATIONS = 64
"""How many compilations of a block are allowed: kinds of block, with and without gradient, and sizes."""


class _Reached(Exception):
    """The forward pass came to the first block, and that was all that was wanted."""


class Decoder:
    """The decoder of `model`: `module` is transformers' own, whose layers are `blocks`."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - a transformers model; modified
        self.module = model.get_decoder()
        self.blocks: list[Any] = list(self.module.layers)
        self._is_compiled = False

    def compile(self) -> None:
        """On an accelerator; a second time does nothing."""
        if self.blocks[0].input_layernorm.weight.is_cuda and not self._is_compiled:
            torch._dynamo.config.recompile_limit = COMPILATIONS
            for block in (*self.blocks, self.module.norm):
                block.compile(dynamic=False)
            self._is_compiled = True

    @property
    def lowest_trained(self) -> int:
        """The first block with a gradient (0 where embeddings train), or the number of blocks."""
        if any(p.requires_grad for p in self.module.embed_tokens.parameters()):
            return 0
        return next((i for i, block in enumerate(self.blocks) if _trains(block)), len(self.blocks))

    def kind(self, index: int) -> Hashable:
        """Blocks of one kind cost the same: by place, by what trains, by what they are made of."""
        block, lowest = self.blocks[index], self.lowest_trained
        place = (index >= lowest) + (index > lowest)
        return place, _trains(block), tuple(type(m) for m in block.modules()), getattr(block, "attention_type", None)

    def recompute(self, count: int) -> list[bool]:
        """Let `count` blocks, spread over those with a gradient, compute their activations again in backward; returns
        which."""
        lowest = self.lowest_trained
        candidates = len(self.blocks) - lowest
        chosen = {lowest + i * candidates // count for i in range(count)}
        for index, block in enumerate(self.blocks):
            block.gradient_checkpointing = index in chosen
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        return [index in chosen for index in range(len(self.blocks))]

    def arguments(self, run: Callable[[], Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        """The states and the keyword arguments with which `run` calls the first block; `run` goes no further."""
        found: list[tuple[torch.Tensor, dict[str, Any]]] = []

        def catch(block: Any, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:  # noqa: ANN401
            found.append((positional[0], keywords))
            raise _Reached

        hook = self.blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
        try:
            with torch.no_grad():
                run()
        except _Reached:
            pass
        finally:
            hook.remove()
        return found[0]


def _trains(block: Any) -> bool:  # noqa: ANN401 - a module
    return any(p.requires_grad for p in block.parameters())
