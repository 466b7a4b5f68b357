"""Spec sections: suites, gate, fingerprint and cost. Suite files are relative to the spec."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mansard.specs.part import Fraction, Part, Positive


class Suite(Part):
    """A suite file: items (JSONL under the site's data folder) or the name of an lm-evaluation-harness task."""

    format: Literal[1]
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    kind: Literal["bits_per_byte", "multiple_choice", "harness"]
    items: str | None = None
    task: str | None = None
    limit: Positive | None = None

    @model_validator(mode="after")
    def items_or_task(self) -> Self:
        if (self.kind == "harness") != (self.task is not None) or (self.task is None) == (self.items is None):
            raise ValueError("kind harness takes task, the other kinds take items")
        return self


class SuiteRole(Part):
    """How the gate uses a suite. `margin`: the loss a guard may show, or the gain a target must pass.

    What is expected at no change decides whether a guard has the power to pass, before anything is trained: for right
    or wrong answers the share of items that differ, and by how much the items of one file agree (1: they do not); for
    bits per byte the standard deviation of a file's paired difference (measured 2026-11: 0.02 to 0.09 on 120 files).
    """

    suite: str
    role: Literal["target", "guard", "report"]
    margin: Annotated[float, Field(ge=0)] = 0.0
    expected_discordance: Annotated[float, Field(gt=0, le=1)] = 0.2
    expected_design_effect: Annotated[float, Field(ge=1)] = 1.0
    expected_standard_deviation: Annotated[float, Field(gt=0)] = 0.05


class Gate(Part):
    """`alpha` is the one-sided level that all attempts since a promotion may spend; attempt k is judged at
    6 alpha / (pi^2 k^2). `targets`: whether all targets must improve or any (Holm over them either way).
    `max_shared_fraction`: of a suite's items, how many may share a 13-gram with training text."""

    suites: Annotated[list[SuiteRole], Field(min_length=1)]
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    targets: Literal["all", "any"] = "all"
    max_shared_fraction: Fraction = 0.1
    resamples: Positive = 10_000
    anchor_version: Positive = 1
    seed: int = 0


class Fingerprint(Part):
    """Guard prompts whose greedy answers are recorded; log-probabilities may move by `tolerance` (natural log)."""

    prompts: Annotated[list[str], Field(min_length=1)]
    tokens: Positive = 16
    tolerance: Annotated[float, Field(gt=0)] = 0.1


class Cost(Part):
    """Latency measured on candidate and stable with the same prompts, one after the other."""

    prompts: Positive = 24
    concurrency: Positive = 4
    prompt_tokens: Positive = 64
    output_tokens: Positive = 32
