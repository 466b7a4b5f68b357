"""Stage `pretrain`: the demo's base, trained on the docstrings of the corpus, as a Hugging Face directory.

Input `corpus`. Spec: {"format": 1, "model": {"vocabulary", "hidden", "intermediate", "blocks", "heads", "max_tokens"},
"sequence_tokens", "train": specs.Train, its rate in learning_rates.base}. The loop of an upgrade with nothing frozen.
"""

import shutil
import sys
from typing import TYPE_CHECKING

import torch

from mansard.demo.base import save_base, train_tokenizer, untrained_model
from mansard.errors import BadInput
from mansard.records import SnapshotId
from mansard.specs.training import Train
from mansard.training.data import Mixture, Packed, pack_texts, read_texts, require_rows
from mansard.training.engines import CPU_THREADS, LocalEngine
from mansard.training.loop import Plan, run_loop
from mansard.training.optimizer import Group
from mansard.training.report import reporter
from mansard.training.state import Checkpoints

if TYPE_CHECKING:
    from mansard.worker import StageContext

CODE_VERSION = 7
PACKAGES = ("numpy", "safetensors", "tokenizers", "torch", "transformers")

HELD_OUT_DOMAINS = ("docstrings", "code")


def run(context: "StageContext") -> SnapshotId:
    spec = context.spec
    if spec["format"] != 1:
        raise BadInput(f"pretrain: format {spec['format']!r}: 1 is expected")
    train = Train.model_validate(spec["train"])
    torch.set_num_threads(CPU_THREADS)
    texts = _texts(context, "docstrings.train.jsonl")
    tokenizer = train_tokenizer(texts, spec["model"]["vocabulary"], spec["model"]["max_tokens"])

    def packed(domain: str, part: str, rows: int) -> Packed:
        name = f"{domain}.{part}.jsonl"
        found = pack_texts(domain, _texts(context, name), tokenizer, spec["sequence_tokens"], train.seed)
        return require_rows(found, name, rows)

    mixture = Mixture([packed("docstrings", "train", train.batch_sequences)], [1.0], train.batch_sequences, train.seed)
    model = untrained_model(spec["model"], train.seed)
    group = Group("base", train.learning_rates.base, dict(model.named_parameters()))
    plan = Plan.of(train, spec["sequence_tokens"])
    print(
        f"pretrain: {sum(p.numel() for p in model.parameters()):,} parameters, {plan.tokens:,} tokens", file=sys.stderr
    )
    run_loop(
        LocalEngine(model, [group], train.weight_decay, train.clip_norm),
        mixture,
        [packed(domain, "held-out", 1) for domain in HELD_OUT_DOMAINS],
        plan,
        Checkpoints(context.work),
        reporter(context, plan),
    )
    output = context.work / "output"
    shutil.rmtree(output, ignore_errors=True)
    save_base(model, tokenizer, output)
    snapshot: SnapshotId = context.store.snapshot(output)
    return snapshot


def _texts(context: "StageContext", name: str) -> list[str]:
    return read_texts(context.store.read_file(context.inputs["corpus"], name), name)
