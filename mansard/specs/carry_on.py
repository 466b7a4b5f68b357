"""Spec sections of a carry-on: its branch, the captured states, training and the choice of alpha."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mansard.specs.part import Fraction, Part, Positive


class Branch(Part):
    """The branch of a carry-on: `blocks` decoder blocks, of a `width` or of at most so many `parameters`. `taps`:
    layers of the base whose states it reads beside the final one (tap i: after i layers)."""

    blocks: Positive = 2
    width: Annotated[int, Field(ge=8, multiple_of=8)] | None = None
    parameters: Positive | None = None
    taps: list[Positive] = Field(default=[])

    @model_validator(mode="after")
    def taps_are_in_order(self) -> Self:
        if self.taps != sorted(set(self.taps)):
            raise ValueError(f"taps {self.taps}: name each layer once, in ascending order")
        return self

    @model_validator(mode="after")
    def one_size(self) -> Self:
        if (self.width is None) == (self.parameters is None):
            raise ValueError("name exactly one of width, parameters")
        return self


class Capture(Part):
    """States taken from the base as served: so many `tokens` of training text (shared out by the sources' weights;
    training beyond them reads them again) and `held_out_rows` of each source. `scheme`: how they are kept; 8 bits have
    a scale per token (a scale per tensor destroys the states: the first token's norm is about a hundred times the
    others')."""

    tokens: Positive
    held_out_rows: Positive = 32
    scheme: Literal["bf16", "fp8", "int8"] = "fp8"


class BranchTrain(Part):
    """A branch's training. `alpha` is the share at which it is added while it learns. With precision: bf16,
    `adamw_8bit` and `stochastic_rounding` train 100 M parameters in less than a gigabyte; fp32 masters and moments
    alone take more."""

    tokens: Positive
    batch_sequences: Positive
    learning_rate: Annotated[float, Field(gt=0)]
    alpha: Annotated[float, Field(gt=0)] = 1.0
    warmup_fraction: Fraction = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    precision: Literal["fp32", "bf16"] = "bf16"
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    master: Literal["fp32", "stochastic_rounding"] = "fp32"
    evaluate_every_steps: Positive = 50
    checkpoint_every_steps: Positive = 50
    seed: int = 0

    @model_validator(mode="after")
    def rounding_needs_bf16(self) -> Self:
        if self.master == "stochastic_rounding" and self.precision == "fp32":
            raise ValueError("master: stochastic_rounding needs precision: bf16, not fp32")
        return self


class ChooseAlpha(Part):
    """Which alpha is registered: the one of `tried` at which the domain's held-out text is shortest while no other
    source's gets longer than the base's by more than `guard_bits` (bits per byte); or `fixed`, whatever they say."""

    tried: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)] = Field(
        default=[0.25, 0.5, 0.75, 1.0, 1.25]
    )
    guard_bits: Annotated[float, Field(ge=0)] = 0.0
    fixed: Annotated[float, Field(ge=0)] | None = None
