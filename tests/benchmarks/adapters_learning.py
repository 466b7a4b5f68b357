"""A small model learns with adapters: the demo's shape, pre-trained on docstrings, gains four blocks that learn code.

The same base, tokens, rate and rows with whole new blocks and with LoRA, DoRA and QLoRA of a rank; the base is held in
bf16 on the disk and computed in float32. Bits per byte on held-out text before and after, and how far the trainer's
forward pass is from the fused model's (nats a token).
"""

import json
import sysconfig
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from demo_shape import SEQUENCE_TOKENS, SHAPE

from mansard.demo.base import save_base, train_tokenizer, untrained_model
from mansard.demo.corpus import listed_files, read_domains, up_to
from mansard.models.expand import apply, plan
from mansard.models.loading import load_tokenizer
from mansard.models.model_files import model_config
from mansard.specs import Data, Expand, LearningRates, Source, Train
from mansard.store import Store
from mansard.training import stage
from mansard.training.data import Mixture, pack_texts
from mansard.training.engines import LocalEngine
from mansard.training.loop import Plan, run_loop
from mansard.training.optimizer import Group
from mansard.training.state import Checkpoints
from mansard.worker import Channel, StageContext

TEXT_BYTES = 1_500_000
BASE_TOKENS, TOKENS = 400_000, 150_000
BASE_RATE, RATE = 3e-3, 2e-3
HELD_OUT_OF = 10


def section(tokens: int, rows: int, rate: float, **others: Any) -> Train:
    return Train.model_validate(
        {"tokens": tokens, "batch_sequences": rows, "learning_rates": LearningRates(new_blocks=rate),
         "precision": "fp32", "evaluate_every_steps": 10_000, "checkpoint_every_steps": 10_000, **others}
    )  # fmt: skip


def learned(work: Path, adapters: dict[str, dict[str, Any] | None]) -> dict[str, dict[str, float]]:
    """By case: what came of a training with that adapter."""
    library = Path(sysconfig.get_path("stdlib"))
    domains = read_domains(library, listed_files(library))
    texts = {name: [d.text for d in up_to(domains[name], TEXT_BYTES, 0)] for name in ("code", "docstrings")}
    store = Store(work / "store")
    base = store.snapshot(_base(work, texts["docstrings"]))
    inputs = {"expansion": apply(store, base, plan(model_config(store, base), Expand(blocks=4)))}
    for name, found in texts.items():
        lines = [json.dumps({"text": text, "file": f"{i}.py"}).encode() + b"\n" for i, text in enumerate(found)]
        count = len(lines) // HELD_OUT_OF
        inputs[f"data.{name}.train"] = store.put_files({"data.jsonl": b"".join(lines[count:])})
        inputs[f"data.{name}.held_out"] = store.put_files({"data.jsonl": b"".join(lines[:count])})
    sources = [Source(name=n, train=n, held_out=n, weight=0.5, is_domain=n == "code") for n in texts]
    data = Data(sources=sources, sequence_tokens=SEQUENCE_TOKENS).model_dump(mode="json")
    made = {}
    for number, (case, adapter) in enumerate(adapters.items()):
        train = section(TOKENS, 4, RATE, adapter=adapter, max_forward_kl=10.0)
        recipe = f"{number:064x}"
        asked = {"data": data, "train": train.model_dump(mode="json")}
        snapshot = stage.run(
            StageContext(store, recipe, inputs, asked, {}, store.work(recipe), Channel(StringIO()))
        )
        report = json.loads(store.read_file(snapshot, "training.json"))
        bits = {f"{name}_before": value for name, value in report["curve"][0]["bits_per_byte"].items()}
        made[case] = bits | report["curve"][-1]["bits_per_byte"] | {"forward_kl": report["forward_kl"]}
    return made


def _base(work: Path, texts: list[str]) -> Path:
    """Pre-trained on the texts and written, in bf16."""
    model, folder = untrained_model(SHAPE, 0), work / "pretrained"
    save_base(model, train_tokenizer(texts, SHAPE["vocabulary"], 1024), folder)
    packed = pack_texts("docstrings", texts, load_tokenizer(folder), SEQUENCE_TOKENS, 0)
    engine = LocalEngine(model, [Group("all", BASE_RATE, dict(model.named_parameters()))], 0.0, 1.0)
    budget = Plan.of(section(BASE_TOKENS, 8, BASE_RATE), SEQUENCE_TOKENS)
    run_loop(engine, Mixture([packed], [1.0], 8, 0), [], budget, Checkpoints(work / "base"), lambda moment: None)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder
