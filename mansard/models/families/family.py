"""What the surgery must know of an architecture, as data: names, shapes, what silences a block, where memory differs.

Names are exact, so a new block never takes or trains a tensor by a lucky substring. A name without the prefix of its
block (`mlp.down_proj.weight`) is called a name in the block.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mansard.errors import BadInput

Config = Mapping[str, Any]
"""config.json, parsed."""

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name -> shape."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Where transformers holds a checkpoint's tensor: all of a parameter, or of a stack of experts [E, rows, columns]
    the `part`-th of `parts` equal groups of one expert's rows."""

    parameter: str
    expert: int | None = None
    part: int = 0
    parts: int = 1


def whole(name: str) -> Slot:
    """The tensor is a parameter of its own, of the same name."""
    return Slot(name)


def no_entries(config: Config, sources: Sequence[int]) -> dict[str, Any]:
    """A family whose config.json follows the general rule."""
    return {}


def anything(config: Config) -> None:
    """A family whose every config can be expanded and served."""


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture.

    `silent_value(name in block)` is the value that silences the last factors before each residual sum, None for tensors
    that are copied: with those values a block adds nothing. `slot(name in block)` says where transformers holds it.
    `rebuilt_entries(config, sources)` are the entries of config.json that the general rule cannot rebuild;
    `check_config` raises BadInput for configs that cannot be expanded or served. `config_keys` are the keys that this
    family knows beside those of every family.
    """

    model_type: str
    architecture: str
    block_shapes: Callable[[Config, int], Shapes]
    outer_shapes: Callable[[Config], Shapes]
    silent_value: Callable[[str], float | None]
    config_keys: frozenset[str]
    ties_embeddings: bool = False
    block_prefix: str = "model.layers."
    optional_block_tensors: tuple[str, ...] = ()
    per_block_lists: tuple[str, ...] = ()
    slot_in_block: Callable[[str], Slot] = whole
    rebuilt_entries: Callable[[Config, Sequence[int]], dict[str, Any]] = no_entries
    check_config: Callable[[Config], None] = anything

    def block_tensor(self, block: int, name: str) -> str:
        """The checkpoint's name of a block's tensor."""
        return f"{self.block_prefix}{block}.{name}"

    def block_tensors(self, config: Config, block: int) -> tuple[str, ...]:
        """The names in the block of everything that a block must have."""
        return tuple(self.block_shapes(config, block))

    def outer_tensors(self, config: Config) -> tuple[str, ...]:
        """The tensors outside the blocks that a checkpoint must have."""
        head = ("lm_head.weight",) if self.has_tied_embeddings(config) else ()
        return tuple(n for n in self.outer_shapes(config) if n not in head)

    def has_tied_embeddings(self, config: Config) -> bool:
        return flag(config, "tie_word_embeddings", self.ties_embeddings)

    def split(self, tensor: str) -> tuple[int, str] | None:
        """(block, name in the block) of a checkpoint's tensor; None for tensors outside blocks."""
        block, dot, name = tensor.removeprefix(self.block_prefix).partition(".")
        if not tensor.startswith(self.block_prefix) or not dot or not (block.isascii() and block.isdigit()):
            return None
        return (int(block), name) if str(int(block)) == block else None

    def slot(self, tensor: str) -> Slot:
        """Where transformers holds a checkpoint's tensor."""
        place = self.split(tensor)
        if place is None:
            return Slot(tensor)
        slot = self.slot_in_block(place[1])
        return Slot(self.block_tensor(place[0], slot.parameter), slot.expert, slot.part, slot.parts)


def zeros_at(*modules: str) -> Callable[[str], float | None]:
    """`silent_value` of a family whose last factors are these modules, biases included."""
    names = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    return lambda name: 0.0 if name in names else None


def count(config: Config, name: str, default: int | None = None) -> int:
    """A number from 1 up; BadInput where there is none."""
    value = config.get(name, default)
    if type(value) is not int or value < 1:
        raise BadInput(f"config.json: {name}: {value!r:.80}; a number from 1 up is expected")
    return value


def flag(config: Config, name: str, default: bool = False) -> bool:
    value = config.get(name, default)
    if type(value) is not bool:
        raise BadInput(f"config.json: {name}: {value!r:.80}; true or false is expected")
    return value


def depth_of(config: Config) -> int:
    """Number of blocks."""
    return count(config, "num_hidden_layers")
