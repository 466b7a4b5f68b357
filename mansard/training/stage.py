"""Stage `train`: the new blocks of an expansion learn a mixture; everything else is frozen, and that is measured.

Output: `trained.safetensors` (trained tensors under checkpoint names, in the checkpoint's type), `probe.safetensors`
(token ids, and the trained model's logits on them in the checkpoint's type by `mansard.models.probe`, for fuse to
compare with) and `training.json` (curve, achieved fractions, digests of the frozen tensors in memory, how far the
trainer's forward pass is from the checkpoint's on the probe; no times). With a base learning rate above 0 the base
trains too, what changed of it is listed, and nothing is called frozen.
"""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from safetensors.torch import load_file, save_file

from mansard.canonical import canonical_json
from mansard.errors import BadInput, StageFailed
from mansard.models.loading import choose_device, load_model, load_tokenizer
from mansard.models.probe import forward_logits
from mansard.models.slots import view
from mansard.models.storeys import read_expansion
from mansard.records import SnapshotId
from mansard.specs import Data, Train
from mansard.training.blocks import Names, announcement, checkpoint_names, train_only
from mansard.training.data import Mixture, Packed, pack_texts, read_texts, require_rows
from mansard.training.engines import CPU_THREADS, LocalEngine
from mansard.training.loop import Plan, run_loop
from mansard.training.memory import peak_bytes
from mansard.training.optimizer import Group
from mansard.training.packing import check_fits
from mansard.training.preflight import preflight
from mansard.training.report import reporter
from mansard.training.state import Checkpoints

if TYPE_CHECKING:
    from mansard.worker import StageContext

CODE_VERSION = 7
PACKAGES = ("numpy", "safetensors", "tokenizers", "torch", "transformers")

PROBE_ROWS = 2
PROBE_TOKENS = 64

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run(context: "StageContext") -> SnapshotId:
    data, train = Data.model_validate(context.spec["data"]), Train.model_validate(context.spec["train"])
    torch.set_num_threads(CPU_THREADS)
    torch.manual_seed(train.seed)
    plan = Plan.of(train, data.sequence_tokens)
    with context.store.using(context.inputs["expansion"]) as expansion:
        blocks = read_expansion(context.store, context.inputs["expansion"]).new_blocks
        names = checkpoint_names(context.store, context.inputs["expansion"])
        mixture, held_out = read_mixture(context, data, train, load_tokenizer(expansion))
        fractions = achieved_fractions(mixture, data, plan.schedule.steps)
        model = load_model(expansion, DTYPES[train.precision], device=choose_device())
        highest = max(int(packed.tokens_RT.max()) for packed in (*mixture.sources, *held_out))
        check_fits(model.config, data.sequence_tokens, highest)
        groups, frozen = train_only(model, names, train.learning_rates, train.frozen, train.new_blocks)
        engine = engine_of(model, groups, train)
        text = announcement(model, blocks, groups, train)
        print(f"train: {text}", file=sys.stderr, flush=True)
        forecast = preflight(engine, mixture.batch(0), train)
        print(f"train: {forecast.text()}", file=sys.stderr, flush=True)
        context.progress(0, plan.tokens, "tokens", f"{text}; {forecast.text()}")
        cursor = run_loop(engine, mixture, held_out, plan, Checkpoints(context.work), reporter(context, plan))
        frozen.check(model)
        print(f"train: peak memory {peak_bytes(engine.device) / 2**30:.2f} GiB", file=sys.stderr, flush=True)
        probe_BT = probe_of(held_out)
        trained, seen_BTV = engine.trained(), engine.logits(probe_BT)
        del model, engine, groups  # the checkpoint is loaded once more below
        output = context.work / "output"
        changed, probe = write_tensors(expansion, names, trained, probe_BT, output)
        divergence = forward_kl(seen_BTV, output)
        if divergence > train.max_forward_kl:
            raise StageFailed(
                f"the trainer's forward pass is {divergence:.4f} nats a token from the fused model's, "
                f"train.max_forward_kl allows {train.max_forward_kl}; take frozen: bf16, or new_blocks: bf16"
            )
        report = {
            "format": 1,
            "new_blocks": [{"index": b.index, "source": b.source} for b in blocks],
            "tokens": plan.tokens,
            "steps": plan.schedule.steps,
            "precision": train.precision,
            "forward_kl": divergence,
            "fractions": fractions,
            "curve": cursor.curve,
            "frozen": dict(frozen.digests),
            "changed_base_tensors": changed,
            "probe": probe,
        }
        (output / "training.json").write_bytes(canonical_json(report))
        snapshot: SnapshotId = context.store.snapshot(output)
        return snapshot


def read_mixture(
    context: "StageContext",
    data: Data,
    train: Train,
    tokenizer: Any,  # noqa: ANN401 - a transformers tokenizer
) -> tuple[Mixture, list[Packed]]:
    """The training mixture and the held-out texts; BadInput names the input that is missing, damaged or too short."""

    def packed(source: str, part: str, rows: int) -> Packed:
        name = f"data.{source}.{part}"
        if name not in context.inputs:
            raise BadInput(f"{name}: no such input; one snapshot for each of data.sources is expected")
        texts = read_texts(context.store.read_file(context.inputs[name], "data.jsonl"), name)
        packed = pack_texts(source, texts, tokenizer, data.sequence_tokens, data.seed)
        return require_rows(packed, name, rows)

    training = [packed(s.name, "train", train.batch_sequences) for s in data.sources]
    held_out = [packed(s.name, "held_out", 1) for s in data.sources]
    return Mixture(training, [s.weight for s in data.sources], train.batch_sequences, data.seed), held_out


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


def engine_of(model: Any, groups: list[Group], train: Train) -> LocalEngine:  # noqa: ANN401 - a transformers model
    return LocalEngine(
        model,
        groups,
        train.weight_decay,
        train.clip_norm,
        optimizer=train.optimizer,
        master=train.master,
        micro_batch_sequences=train.micro_batch_sequences,
    )


def probe_of(held_out: list[Packed]) -> torch.Tensor:
    """Token ids [B, T] of the first rows of every held-out text."""
    rows = [source.tokens_RT[:PROBE_ROWS, :PROBE_TOKENS] for source in held_out]
    return torch.from_numpy(numpy.concatenate(rows)).long()


def write_tensors(
    expansion: Path,
    names: Names,
    trained: Mapping[str, torch.Tensor],
    probe_BT: torch.Tensor,
    output: Path,
) -> tuple[list[str], dict[str, Any]]:
    """trained.safetensors and probe.safetensors, made from the checkpoint with the trained tensors put in; returns the
    base's tensors that changed, and how the probe was computed."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    model = load_model(expansion, None, device=choose_device())
    parameters = dict(model.named_parameters())
    wanted = {name: slot for name, slot in names.slots.items() if slot.parameter in trained}
    made, changed = {}, []
    with torch.no_grad():
        for name, slot in sorted(wanted.items()):
            tensor, master = view(parameters[slot.parameter], slot), view(trained[slot.parameter], slot)
            before = tensor.clone()
            tensor.copy_(master)
            kept = tensor.detach().cpu()
            made[name] = kept.contiguous() if slot.expert is None else kept.clone()
            if name not in names.new and not torch.equal(before, tensor):
                changed.append(name)
    save_file(made, output / "trained.safetensors")
    logits_BTV = forward_logits(model, probe_BT)
    save_file({"input_ids": probe_BT, "logits": logits_BTV}, output / "probe.safetensors")
    attention = model.config._attn_implementation
    return changed, {"dtype": str(logits_BTV.dtype).removeprefix("torch."), "attention": attention}


def forward_kl(seen_BTV: torch.Tensor, output: Path) -> float:
    """Mean over the probe's tokens of KL(trainer's || trained checkpoint's) in nats."""
    fused_BTV = load_file(output / "probe.safetensors")["logits"].float().log_softmax(-1)
    seen_BTV = seen_BTV.log_softmax(-1)
    return float((seen_BTV.exp() * (seen_BTV - fused_BTV)).sum(-1).mean())
