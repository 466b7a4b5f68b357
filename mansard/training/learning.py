"""What one process does of a training: text, model, groups, loop; the same for one process and for each of several.

Does not cover: what becomes of the trained tensors (stage.py), and how several processes come to be (ranks.py).
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy
import torch

from mansard.errors import BadInput
from mansard.models.loading import choose_device, load_model
from mansard.models.storeys import NewBlock, read_expansion
from mansard.models.tokenizer_files import take_tokenizer
from mansard.specs.data import Data
from mansard.specs.training import Train
from mansard.training.adapters import plan as plan_adapters
from mansard.training.adapters import train_adapters
from mansard.training.anchor import Anchor
from mansard.training.blocks import announcement, checkpoint_names, train_only
from mansard.training.data import Batch, Mixture, PackedText, require_rows
from mansard.training.engines import CPU_THREADS, Engine
from mansard.training.loop import Plan, run_loop
from mansard.training.memory import peak_bytes
from mansard.training.optimizer import Group
from mansard.training.packing import check_fits
from mansard.training.report import reporter
from mansard.training.shards import Shards, open_shards
from mansard.training.state import Checkpoints

if TYPE_CHECKING:
    from mansard.worker import StageContext

PROBE_ROWS = 2
PROBE_TOKENS = 64

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

MakeEngine = Callable[[Any, Sequence[Group], Train, Anchor | None], "LearningEngine"]
"""From a transformers model, the groups that train, the spec's section, and what it is anchored by."""
Forecast = Callable[[Any, Batch, Train], str]
"""What is said of an engine before its first step, from one batch."""


class LearningEngine(Engine, Protocol):
    """What a whole training needs of an engine beside its loop."""

    def trained(self) -> Mapping[str, torch.Tensor]: ...

    def logits(self, tokens_BT: torch.Tensor) -> torch.Tensor: ...

    def digests(self, names: Iterable[str]) -> dict[str, str]: ...


@dataclass(frozen=True, slots=True)
class Learned:
    """What a training leaves. `trained` are float32 (or the parameters, where they are rounded) by parameter name;
    `seen_BTV` the trainer's logits on the probe `probe_BT`; `frozen` the digests of what did not move."""

    blocks: Sequence[NewBlock]
    trained: Mapping[str, torch.Tensor]
    probe_BT: torch.Tensor
    seen_BTV: torch.Tensor
    fractions: dict[str, float]
    curve: list[dict[str, Any]]
    frozen: dict[str, str]


def learn(
    context: "StageContext", make_engine: MakeEngine, forecast: Forecast, checkpoints: Checkpoints
) -> Learned:
    """Train to the plan's end, from the newest checkpoint where there is one. Raises as stage `train` does."""
    data, train = Data.model_validate(context.spec["data"]), Train.model_validate(context.spec["train"])
    torch.set_num_threads(CPU_THREADS)
    torch.manual_seed(train.seed)
    plan = Plan.of(train, data.sequence_tokens)
    with context.store.using(context.inputs["expansion"]) as expansion:
        blocks = read_expansion(context.store, context.inputs["expansion"]).new_blocks
        names = checkpoint_names(context.store, context.inputs["expansion"])
        training, held_out = mapped_texts(context, data, train)
        weights, general = [s.weight for s in data.sources], {s.name for s in data.sources if not s.is_domain}
        mixture = Mixture(training, weights, train.batch_sequences, data.seed, general)
        fractions = achieved_fractions(mixture, data, plan.schedule.steps)
        if train.adapter is not None:
            plan_adapters(names, train.adapter)
        device = choose_device()
        # Whole on the CPU first, where it is to be small on the device.
        waits = train.adapter is not None and train.adapter.method == "qlora"
        model = load_model(expansion, DTYPES[train.precision], device=None if waits else device)
    highest = max(text.highest_token for text in (*training, *held_out))
    check_fits(model.config, data.sequence_tokens, highest)
    if train.adapter is None:
        groups, frozen = train_only(model, names, train.learning_rates, train.frozen, train.new_blocks)
    else:
        groups, frozen = train_adapters(model, names, train, device)
    text = announcement(model, blocks, groups, train)
    print(f"train: {text}", file=sys.stderr, flush=True)
    engine = make_engine(model, groups, train, anchor_of(train, data, blocks))
    expected = forecast(engine, mixture.batch(0), train)
    print(f"train: {expected}", file=sys.stderr, flush=True)
    context.progress(0, plan.tokens, "tokens", f"{text}; {expected}")
    cursor = run_loop(engine, mixture, held_out, plan, checkpoints, reporter(context, plan))
    frozen.check(engine.digests(frozen.digests))
    print(f"train: peak memory {peak_bytes(engine.device) / 2**30:.2f} GiB", file=sys.stderr, flush=True)
    probe_BT = probe_of(held_out)
    trained, seen_BTV = engine.trained(), engine.logits(probe_BT)
    return Learned(blocks, trained, probe_BT, seen_BTV, fractions, cursor.curve, dict(frozen.digests))


def mapped_texts(context: "StageContext", data: Data, train: Train) -> tuple[list[Shards], list[Shards]]:
    """The training and the held-out texts of the sources, mapped; BadInput names the input that is missing, made for
    another data section or model, or too short."""
    tokenizer = take_tokenizer(context.store, context.inputs["expansion"])

    def opened(source: str, part: str, rows: int) -> Shards:
        name = f"data.{source}.{part}"
        if name not in context.inputs:
            raise BadInput(f"{name}: no such input; what stage tokenize makes of each of data.sources is expected")
        text = open_shards(context.store, context.inputs[name], source)
        asked = {"sequence_tokens": data.sequence_tokens, "seed": data.seed, "source": source, "tokenizer": tokenizer}
        made = {"sequence_tokens": text.row_tokens, **text.made_with}
        for key, right in asked.items():
            if made[key] != right:
                told = f"tokenized with {key} {made[key]!r}, this training's is {right!r}"
                raise BadInput(f"{name}: {told}; tokenize again")
        return require_rows(text, name, rows)

    training = [opened(s.name, "train", train.batch_sequences) for s in data.sources]
    return training, [opened(s.name, "held_out", 1) for s in data.sources]


def anchor_of(train: Train, data: Data, blocks: Sequence[NewBlock]) -> Anchor | None:
    """BadInput where there is no general text to hold on to."""
    if train.anchor is None:
        return None
    if all(source.is_domain for source in data.sources):
        raise BadInput("train.anchor: no general text in data.sources; add a source with is_domain: false")
    return Anchor(train.anchor.kind, train.anchor.weight, tuple(block.index for block in blocks))


def achieved_fractions(mixture: Mixture, data: Data, steps: int) -> dict[str, float]:
    """Shares of the packed tokens that `steps` steps take; BadInput where the domain's is below the spec's (by more
    than the row that rounding can cost)."""
    taken = mixture.rows_taken(steps)
    total = sum(taken.values())
    domain = sum(taken[s.name] for s in data.sources if s.is_domain)
    if domain + 1 < data.min_domain_fraction * total:
        raise BadInput(
            f"the mixture takes {domain} of {total} rows from domain data, data.min_domain_fraction asks for "
            f"{data.min_domain_fraction}; raise the weight of a source with is_domain: true"
        )
    return {name: rows / total for name, rows in taken.items()}


def probe_of(held_out: Sequence[PackedText]) -> torch.Tensor:
    """Token ids [B, T] of the first rows of every held-out text."""
    rows = [source.rows(range(min(PROBE_ROWS, len(source))))[0][:, :PROBE_TOKENS] for source in held_out]
    return torch.from_numpy(numpy.concatenate(rows)).long()
