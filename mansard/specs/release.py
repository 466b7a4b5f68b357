"""Spec sections: the walk of a version to its users."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from mansard.specs.part import Fraction, Part, Positive


class CanaryStep(Part):
    """One stop: at `weight_percent` for at least `bake_seconds` and `min_requests`, at most `deadline_seconds`."""

    weight_percent: Annotated[int, Field(ge=1, le=100)]
    bake_seconds: Annotated[float, Field(ge=0)]
    min_requests: Positive
    deadline_seconds: Positive = 3600


class Release(Part):
    """The walk. A step fails when the canary provably fails more than stable and by more than `max_error_excess`, when
    its latency is provably above stable's times the ratio that evaluation measured (at least 1) times
    `latency_tolerance`, or when its answers are provably more than `output_tolerance` times longer or shorter.
    """

    steps: Annotated[list[CanaryStep], Field(min_length=1)]
    max_error_excess: Fraction = 0.01
    latency_tolerance: Annotated[float, Field(ge=1.0)] = 1.2
    output_tolerance: Annotated[float, Field(gt=1.0)] = 2.0

    @model_validator(mode="after")
    def weights_rise(self) -> Self:
        weights = [s.weight_percent for s in self.steps]
        if weights != sorted(set(weights)):
            raise ValueError(f"steps have weights {weights}; each must be above the one before")
        return self
