"""Spec sections: how Pro blocks are trained."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mansard.specs.part import Fraction, Part, Positive


class LearningRates(Part):
    """Peak rates per group. `base` above 0 unfreezes the base; then nothing is called frozen. `post_norms` are those of
    Gemma's new blocks, which start at a scale of 0; without it they take 30 times `new_blocks`."""

    new_blocks: Annotated[float, Field(ge=0)]
    post_norms: Annotated[float, Field(gt=0)] | None = None
    base: Annotated[float, Field(ge=0)] = 0.0


class Anchor(Part):
    """What keeps the trained model near the base on general text (sources with is_domain: false), in the loss of every
    step: `weight` times, a general token, `kl`: the divergence KL(base || trained) in nats, or `mse`: the squared
    distance of the last hidden states over the base's squared length. Source: Control LLM (arXiv 2501.10979)."""

    kind: Literal["kl", "mse"] = "kl"
    weight: Annotated[float, Field(gt=0)]


class Adapter(Part):
    """What trains of a new block's linears: W + alpha / rank * B A (`lora`), its rows' lengths too (`dora`), or `lora`
    over a base in 4 bits (`qlora`). `modules` are exact names of linears within a block (none: all of them). Vectors
    (norms, biases) train as they are; so do the zeroed projections with `dora`, which divides by their lengths. What is
    fused is the merged weight."""

    method: Literal["lora", "dora", "qlora"]
    rank: Positive
    alpha: Annotated[float, Field(gt=0)]
    modules: Annotated[list[str], Field(min_length=1)] | None = None


class Train(Part):
    """The training loop. `tokens` counts packed tokens; a step takes batch_sequences * sequence_tokens of them, in
    pieces of `micro_batch_sequences` (none: whole).

    `frozen` and `new_blocks`: the type of the blocks' linears' products (none: `precision`), of frozen weights and of
    those that train. fp8 for `frozen` holds frozen weights in FP8; for `new_blocks` it is their forward pass and input
    gradient. bf16 with precision fp32 rounds the products alone, on a CPU those of attention in such blocks too.
    `max_forward_kl`: how far the trainer's forward pass may be from the fused model's on the probe (nats a token).
    `memory_gib`: what training may take; blocks are recomputed in backward until it fits (none: what the device has).
    `adapter`: low-rank matrices in the new blocks train in the place of whole weights (none: whole weights).
    """

    tokens: Positive
    batch_sequences: Positive
    learning_rates: LearningRates
    warmup_fraction: Fraction = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    precision: Literal["fp32", "bf16"] = "bf16"
    frozen: Literal["bf16", "fp8"] | None = None
    new_blocks: Literal["bf16", "fp8"] | None = None
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    master: Literal["fp32", "stochastic_rounding"] = "fp32"
    micro_batch_sequences: Positive | None = None
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    adapter: Adapter | None = None
    max_forward_kl: Annotated[float, Field(gt=0)] = 0.05
    anchor: Anchor | None = None
    evaluate_every_steps: Positive = 50
    checkpoint_every_steps: Positive = 50
    seed: int = 0

    @model_validator(mode="after")
    def parts_go_together(self) -> Self:
        if self.precision == "fp32":
            short = {"frozen": self.frozen == "fp8", "new_blocks": self.new_blocks == "fp8",
                     "master": self.master == "stochastic_rounding"}  # fmt: skip
            for key in (key for key, is_set in short.items() if is_set):
                raise ValueError(f"{key}: {getattr(self, key)} needs precision: bf16, not fp32")
        shortest = {"fp32": 0, "bf16": 1, "fp8": 2}
        if shortest[self.products["new_blocks"]] > shortest[self.products["frozen"]]:
            both = self.new_blocks
            raise ValueError(f"new_blocks: {both} needs frozen: {both}: what never moves is rounded first")
        if self.products["frozen"] != self.precision and self.learning_rates.base > 0.0:
            told = "a base that trains is not frozen; leave frozen and new_blocks out"
            raise ValueError(f"frozen: {self.frozen} needs learning_rates.base 0: {told}")
        if self.anchor is not None and self.learning_rates.base > 0.0:
            raise ValueError("anchor needs learning_rates.base 0: a base that trains is nothing to hold on to")
        if self.micro_batch_sequences is not None and self.batch_sequences % self.micro_batch_sequences:
            raise ValueError(
                f"batch_sequences {self.batch_sequences} is no multiple of micro_batch_sequences "
                f"{self.micro_batch_sequences}"
            )
        return self

    @model_validator(mode="after")
    def adapter_goes_with_the_rest(self) -> Self:
        method = self.adapter.method if self.adapter else None
        if method and self.learning_rates.base > 0.0:
            raise ValueError("adapter needs learning_rates.base 0: adapters train in new blocks only")
        if method and self.products["new_blocks"] != self.precision:
            raise ValueError("adapter needs new_blocks left out: the blocks' own weights are frozen, too")
        if method == "qlora" and self.products["frozen"] != self.precision:
            raise ValueError("adapter: qlora needs frozen left out: it holds frozen linears in 4 bits")
        if self.frozen == "fp8" and method == "dora":
            raise ValueError("adapter: dora needs frozen: bf16: it reads frozen weights' lengths at every step")
        return self

    @property
    def products(self) -> dict[str, str]:
        """Types of the blocks' linears' products: of frozen weights, and of those that train."""
        return {"frozen": self.frozen or self.precision, "new_blocks": self.new_blocks or self.precision}
