"""Spec sections: what is done to the model itself: expansion, proof, fusion, quantization."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from mansard.specs.part import Part, Positive

Placement = Literal["even", "upper-half", "importance"]
NO_GENERAL_TEXT = (
    "expand.positions: importance needs general text: add to data.sources one with is_domain: false, or take even"
)


class Probe(Part):
    """General text on which `positions: importance` weighs the blocks: `rows` windows of `tokens` from each source
    with is_domain: false, the lines of its training text in an order that `seed` draws."""

    rows: Positive = 32
    tokens: Annotated[int, Field(gt=1)] = 512
    seed: int = 0


class Expand(Part):
    """`blocks` new blocks, placed `even` (one after each equal group), so in the `upper-half` only (what lies below the
    lowest new block needs no gradient), after the blocks whose `importance` to general text is least, or after the
    listed 0-based source blocks."""

    blocks: Positive
    positions: Placement | list[Annotated[int, Field(ge=0)]] = "even"
    probe: Probe = Probe()

    @model_validator(mode="after")
    def positions_match_blocks(self) -> Self:
        if isinstance(self.positions, list):
            if len(set(self.positions)) != len(self.positions):
                raise ValueError(f"positions {self.positions} names a block twice; each block takes one copy")
            if len(self.positions) != self.blocks:
                raise ValueError(f"positions lists {len(self.positions)} blocks, but blocks is {self.blocks}")
        return self


class Prove(Part):
    """How the expansion is proved: `logits` on a probe, or `structure` (digests and zeros, in little memory); `auto`
    takes logits where memory holds one model in float32."""

    form: Literal["auto", "logits", "structure"] = "auto"


class Fuse(Part):
    """`residual`: the plain checkpoint of the expanded depth. `average`: of the base's depth, each new block averaged
    into the block that it copied, (1 - weight) * source + weight * new (0.5 by default). It changes the base, so
    nothing of the result is called frozen."""

    method: Literal["residual", "average"] = "residual"
    weight: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def weight_is_the_averages(self) -> Self:
        if self.weight is not None and self.method != "average":
            raise ValueError(f"weight {self.weight} goes with method: average; {self.method} has none")
        return self

    @property
    def share(self) -> float:
        """The new blocks' weight in an average."""
        return 0.5 if self.weight is None else self.weight


class Quantize(Part):
    """What is served. `awq`: 4-bit weights beside 16-bit activations (W4A16), a scale for each `group_size` inputs of a
    row and, unless `symmetric`, a zero point; calibrated on the first `samples` windows of `source`'s training text, in
    fixed order. `none`: the model as it was made, in its own type; it takes no other key, and is written back so."""

    scheme: Literal["awq", "none"] = "awq"
    group_size: Literal[32, 64, 128] = 128
    symmetric: bool = False
    source: str | None = None
    samples: Positive = 128
    sample_tokens: Positive = 256
    seed: int = 0

    @field_validator("scheme", mode="before")
    @classmethod
    def no_preset_name(cls, value: object) -> object:
        if value == "W4A16_ASYM":
            raise ValueError("a preset's name no longer stands for a scheme; write scheme: awq, symmetric: false")
        return value

    @model_validator(mode="after")
    def keys_fit_the_scheme(self) -> Self:
        if self.scheme == "awq" and self.source is None:
            raise ValueError("awq calibrates on text; name one of data.sources as source, or take scheme: none")
        if self.scheme == "none" and (others := sorted(self.model_fields_set - {"scheme"})):
            raise ValueError(f"scheme: none takes no other key ({', '.join(others)}); remove them, or take scheme: awq")
        return self

    @model_serializer(mode="wrap")
    def as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Only what decides something enters digests and recipes."""
        fields: dict[str, Any] = handler(self)
        return fields if self.scheme == "awq" else {"scheme": self.scheme}
