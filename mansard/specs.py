"""Specs: *what* to build. Strict, frozen, hashed. spec_files.py reads them.

A stage receives the `model_dump(mode="json")` of its slice. Paths of data are relative to the site's data folder;
suite files are relative to the spec.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_serializer, model_validator

from mansard.digest import digest_json

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]


class Part(BaseModel):
    """A section of a spec."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Base(Part):
    """Where the base comes from: exactly one of a local folder, a hub id with revision, a registered version."""

    path: str | None = None
    hub: str | None = None
    revision: str | None = None
    version: Positive | Literal["stable"] | None = None

    @model_validator(mode="after")
    def exactly_one_source(self) -> Self:
        if sum(v is not None for v in (self.path, self.hub, self.version)) != 1:
            raise ValueError("name exactly one of path, hub, version")
        if (self.hub is None) != (self.revision is None):
            raise ValueError("hub and revision go together: pin the revision (a commit) of a hub model")
        return self


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


class SourceText(Part):
    """Where a source's text is: `path`, a file (.jsonl, .parquet, .txt) or a folder of files of one kind under the
    site's data folder, or a split of a `hub` data set at a pinned revision. `column` names what holds the text (a
    text file is one document). A bare path stands for {path: ...}, and is written back as one."""

    path: str | None = None
    hub: str | None = None
    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None = None
    split: str | None = None
    config: str | None = None
    column: str = "text"

    @model_validator(mode="after")
    def exactly_one_place(self) -> Self:
        if (self.path is None) == (self.hub is None):
            raise ValueError("name exactly one of path, hub")
        pins = (self.revision is not None, self.split is not None)
        if pins != (self.hub is not None,) * 2 or (self.config is not None and self.hub is None):
            raise ValueError("hub, revision (a commit of 40 hex digits) and split go together; config is for hub only")
        return self

    @model_serializer
    def as_written(self) -> str | dict[str, str]:
        if self.path is not None and self.column == "text":
            return self.path
        return {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}


def _as_text(value: Any) -> Any:  # noqa: ANN401 - whatever a spec holds
    return {"path": value} if isinstance(value, str) else value


Text = Annotated[SourceText, BeforeValidator(_as_text)]


class Source(Part):
    """One training source."""

    name: str
    train: Text
    held_out: Text
    weight: Annotated[float, Field(gt=0)]
    is_domain: bool


class Data(Part):
    """The training mixture. `weight`s are shares of tokens; at least `min_domain_fraction` must be domain data."""

    sources: Annotated[list[Source], Field(min_length=1)]
    sequence_tokens: Positive
    min_domain_fraction: Fraction = 0.3
    seed: int = 0

    @model_validator(mode="after")
    def enough_domain_data(self) -> Self:
        names = [s.name for s in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"sources {names} has a name twice")
        total = sum(s.weight for s in self.sources)
        domain = sum(s.weight for s in self.sources if s.is_domain) / total
        if domain < self.min_domain_fraction:
            raise ValueError(
                f"the mixture holds {domain:.2f} domain data, min_domain_fraction asks for {self.min_domain_fraction}: "
                "raise the weight of a source with is_domain: true"
            )
        return self


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

    `frozen` and `new_blocks`: the type of the linears' products; bf16 leaves them in `precision`. fp8 for `frozen`
    holds frozen weights in FP8; for `new_blocks` it is their forward pass and input gradient. `max_forward_kl`: how far
    the trainer's forward pass may be from the fused model's on the probe (nats a token). `memory_gib`: what training
    may take; blocks are recomputed in backward until it fits (none: what the device has). `adapter`: low-rank
    matrices in the new blocks train in the place of whole weights (none: whole weights).
    """

    tokens: Positive
    batch_sequences: Positive
    learning_rates: LearningRates
    warmup_fraction: Fraction = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    precision: Literal["fp32", "bf16"] = "bf16"
    frozen: Literal["bf16", "fp8"] = "bf16"
    new_blocks: Literal["bf16", "fp8"] = "bf16"
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
        if self.new_blocks == "fp8" and self.frozen == "bf16":
            raise ValueError("new_blocks: fp8 needs frozen: fp8: what never moves is quantized first")
        if self.frozen == "fp8" and self.learning_rates.base > 0.0:
            raise ValueError("frozen: fp8 needs learning_rates.base 0: a base that trains is not frozen")
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
        if method and self.new_blocks == "fp8":
            raise ValueError("adapter needs new_blocks: bf16: their own weights are frozen, frozen: fp8 holds those")
        if self.frozen == "fp8" and method == "qlora":
            raise ValueError("adapter: qlora needs frozen: bf16: it holds frozen linears in 4 bits, fp8 does in 8")
        if self.frozen == "fp8" and method == "dora":
            raise ValueError("adapter: dora needs frozen: bf16: it reads its frozen weights' lengths at every step")
        return self


class Branch(Part):
    """The branch of a carry-on: `blocks` decoder blocks, of a `width` or of at most so many `parameters`. `taps`:
    layers of the base whose states it reads beside the final one (tap i: after i layers)."""

    blocks: Positive = 2
    width: Annotated[int, Field(ge=8, multiple_of=8)] | None = None
    parameters: Positive | None = None
    taps: list[Positive] = []

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
    """A branch's training. `alpha` is the share at which it is added while it learns."""

    tokens: Positive
    batch_sequences: Positive
    learning_rate: Annotated[float, Field(gt=0)]
    alpha: Annotated[float, Field(gt=0)] = 1.0
    warmup_fraction: Fraction = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    precision: Literal["fp32", "bf16"] = "bf16"
    evaluate_every_steps: Positive = 50
    checkpoint_every_steps: Positive = 50
    seed: int = 0


class ChooseAlpha(Part):
    """Which alpha is registered: the one of `tried` at which the domain's held-out text is shortest while no other
    source's gets longer than the base's by more than `guard_bits` (bits per byte); or `fixed`, whatever they say."""

    tried: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)] = [0.25, 0.5, 0.75, 1.0, 1.25]
    guard_bits: Annotated[float, Field(ge=0)] = 0.0
    fixed: Annotated[float, Field(ge=0)] | None = None


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
    """AWQ to 4 bits; calibrated on the first `samples` windows of `source`'s training text, in fixed order."""

    scheme: Literal["W4A16_ASYM"] = "W4A16_ASYM"
    group_size: Literal[128] = 128
    source: str
    samples: Positive = 128
    sample_tokens: Positive = 256
    seed: int = 0


class Serve(Part):
    """Engine arguments that change answers."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    max_model_len: Positive = 1024
    enforce_eager: bool = True
    tensor_parallel: Positive = 1


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


class Spec(Part):
    """What `adopt`, `upgrade` and `customize` share."""

    format: Literal[1]
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    author: str
    base: Base
    serve: Serve = Serve()
    gate: Gate
    fingerprint: Fingerprint
    cost: Cost = Cost()
    release: Release
    data: Data

    def digest(self) -> str:
        return digest_json(self.model_dump(mode="json"))


class QuantizedSpec(Spec):
    """What `adopt` and `upgrade` share: the artifact is quantized from a model that was made or taken."""

    quantize: Quantize

    @model_validator(mode="after")
    def calibration_source_is_known(self) -> Self:
        names = [s.name for s in self.data.sources]
        if self.quantize.source not in names:
            raise ValueError(f"quantize.source {self.quantize.source!r} is not one of data.sources: {names}")
        return self


class AdoptSpec(QuantizedSpec):
    """A first base: quantized, evaluated without comparison, registered with verdict `baseline`."""


class UpgradeSpec(QuantizedSpec):
    """One upgrade: the adopted steps and a storey."""

    expand: Expand
    prove: Prove = Prove()
    train: Train
    fuse: Fuse = Fuse()

    @model_validator(mode="after")
    def importance_has_general_text(self) -> Self:
        if self.expand.positions == "importance" and all(s.is_domain for s in self.data.sources):
            raise ValueError(NO_GENERAL_TEXT)
        return self


class CustomizeSpec(Spec):
    """A branch on a base in service: captured, trained, composed, judged as an upgrade is."""

    branch: Branch
    capture: Capture
    train: BranchTrain
    alpha: ChooseAlpha = ChooseAlpha()

    @model_validator(mode="after")
    def base_is_a_version(self) -> Self:
        if self.base.version is None:
            raise ValueError("base: name a registered version, or stable: states come from an artifact as served")
        return self
