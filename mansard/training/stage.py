"""Stage `train`: the new blocks of an expansion learn a mixture; everything else is frozen, and that is measured.

Output: `trained.safetensors` (trained tensors under checkpoint names, in the checkpoint's type), `probe.safetensors`
(token ids, and the trained model's logits on them in the checkpoint's type by `mansard.models.probe`, for fuse to
compare with) and `training.json` (curve, achieved fractions, digests of the frozen tensors in memory, how far the
trainer's forward pass is from the checkpoint's on the probe, the attention kernels of both; no times). With a base
learning rate above 0 the base trains too, what changed of it is listed, and nothing is called frozen.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from mansard.canonical import canonical_json
from mansard.errors import StageFailed
from mansard.models.attention_kernels import choose_kernel, training_kernel
from mansard.models.loading import choose_device, load_model
from mansard.models.probe import forward_logits
from mansard.models.slots import view
from mansard.records import SnapshotId
from mansard.specs.data import Data
from mansard.specs.training import Adapter, Train
from mansard.training.adapters import merged
from mansard.training.anchor import Anchor
from mansard.training.blocks import Names, checkpoint_names
from mansard.training.data import Batch
from mansard.training.engines import LocalEngine
from mansard.training.learning import Learned, learn
from mansard.training.loop import Plan
from mansard.training.optimizer import Group
from mansard.training.preflight import preflight
from mansard.training.ranks import Ranks, learn_in_ranks
from mansard.training.shards import check_shards
from mansard.training.state import Checkpoints

if TYPE_CHECKING:
    from mansard.worker import StageContext

CODE_VERSION = 11
PACKAGES = ("numpy", "peft", "safetensors", "tokenizers", "torch", "torchao", "transformers")


def run(context: "StageContext") -> SnapshotId:
    check_shards(context.store, {n: s for n, s in context.inputs.items() if n.startswith("data.")})
    train = Train.model_validate(context.spec["train"])
    where = context.where.get("ranks")
    if where is None:
        learned = learn(context, local_engine, local_forecast, Checkpoints(context.work))
    else:
        learned = learn_in_ranks(context, Ranks(**where))
    names = checkpoint_names(context.store, context.inputs["expansion"])
    output = context.work / "output"
    with context.store.using(context.inputs["expansion"]) as expansion:
        changed, probe = write_tensors(expansion, names, learned, train.adapter, output)
    divergence = forward_kl(learned.seen_BTV, output)
    if divergence > train.max_forward_kl:
        closer = "precision: fp32, or allow more"
        if set(train.products.values()) != {train.precision}:
            closer = "products in `precision` (leave frozen and new_blocks out), or allow more"
        if train.adapter is not None and train.adapter.method == "qlora":
            closer = "adapter.method: lora (qlora's forward pass is over a base in 4 bits), or allow more"
        raise StageFailed(
            f"the trainer's forward pass is {divergence:.4f} nats a token from the fused model's, "
            f"train.max_forward_kl allows {train.max_forward_kl}; take {closer}"
        )
    plan = Plan.of(train, Data.model_validate(context.spec["data"]).sequence_tokens)
    report = {
        "format": 1,
        "new_blocks": [{"index": b.index, "source": b.source} for b in learned.blocks],
        "tokens": plan.tokens,
        "steps": plan.schedule.steps,
        "precision": train.precision,
        "products": train.products,
        "forward_kl": divergence,
        "fractions": learned.fractions,
        "curve": learned.curve,
        "frozen": learned.frozen,
        "changed_base_tensors": changed,
        "probe": probe,
    }
    (output / "training.json").write_bytes(canonical_json(report))
    snapshot: SnapshotId = context.store.snapshot(output)
    return snapshot


def local_engine(
    model: Any,  # noqa: ANN401 - a transformers model
    groups: Sequence[Group],
    train: Train,
    anchor: Anchor | None,
) -> LocalEngine:
    return LocalEngine(
        model,
        groups,
        train.weight_decay,
        train.clip_norm,
        optimizer=train.optimizer,
        master=train.master,
        micro_batch_sequences=train.micro_batch_sequences,
        anchor=anchor,
    )


def local_forecast(engine: LocalEngine, batch: Batch, train: Train) -> str:
    return preflight(engine, batch, train).text()


def write_tensors(
    expansion: Path,
    names: Names,
    learned: Learned,
    adapter: Adapter | None,
    output: Path,
) -> tuple[list[str], dict[str, Any]]:
    """trained.safetensors and probe.safetensors, made from the checkpoint with the trained tensors put in (adapters
    merged, in float32); returns the base's tensors that changed, and how the probe was computed."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    model = load_model(expansion, None, device=choose_device())
    parameters = dict(model.named_parameters())
    trained = learned.trained if adapter is None else merged(learned.trained, parameters, names, adapter)
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
    kernel = choose_kernel(model, learned.probe_BT.shape[1])
    logits_BTV = forward_logits(model, learned.probe_BT, kernel)
    save_file({"input_ids": learned.probe_BT, "logits": logits_BTV}, output / "probe.safetensors")
    return changed, {
        "dtype": str(logits_BTV.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "kernel": kernel,
        "trainer_kernel": training_kernel(model.device),
    }


def forward_kl(seen_BTV: torch.Tensor, output: Path) -> float:
    """Mean over the probe's tokens of KL(trainer's || trained checkpoint's) in nats."""
    fused_BTV = load_file(output / "probe.safetensors")["logits"].float().log_softmax(-1)
    seen_BTV = seen_BTV.log_softmax(-1)
    return float((seen_BTV.exp() * (seen_BTV - fused_BTV)).sum(-1).mean())
