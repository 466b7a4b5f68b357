"""A small model learns with adapters: the demo's shape, pre-trained on docstrings, gains four blocks that learn code.

The same base, tokens, rate and rows with whole new blocks and with LoRA, DoRA and QLoRA of a rank; the base is held in
bf16 on the disk and computed in float32. Bits per byte before and after on text that neither the base nor a training
saw, and how far the trainer's forward pass is from the fused model's (nats a token).
"""

import json
import sysconfig
from pathlib import Path
from typing import Any

import torch
from demo_shape import SEQUENCE_TOKENS, SHAPE

from mansard import Text, expand, train
from mansard.demo.base import save_base, train_tokenizer, untrained_model
from mansard.demo.corpus import listed_files, read_domains, up_to
from mansard.models.loading import load_tokenizer
from mansard.specs.training import LearningRates, Train
from mansard.training.data import Mixture, pack_texts
from mansard.training.engines import LocalEngine
from mansard.training.loop import Plan, run_loop
from mansard.training.optimizer import Group
from mansard.training.state import Checkpoints

TEXT_BYTES = 1_500_000
BASE_TOKENS, TOKENS = 400_000, 150_000
BASE_RATE, RATE = 3e-3, 2e-3
HELD_OUT = 20
"""One document in so many."""


def learned(work: Path, adapters: dict[str, dict[str, Any] | None]) -> dict[str, dict[str, float]]:
    """By case: what came of a training with that adapter."""
    library = Path(sysconfig.get_path("stdlib"))
    domains = read_domains(library, listed_files(library))
    sources = []
    for name in ("code", "docstrings"):
        texts = [d.text for d in up_to(domains[name], TEXT_BYTES, 0)]
        held_out, known = texts[::HELD_OUT], [text for i, text in enumerate(texts) if i % HELD_OUT]
        files = [work / f"{name}.{part}.jsonl" for part in ("train", "held-out")]
        for file, some in zip(files, (known, held_out), strict=True):
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
        sources.append(Text(name, files[0], is_domain=name == "code", held_out=files[1]))
    model = expand(_base(work, known), blocks=4, workspace=work / "workspace")
    made = {}
    for case, adapter in adapters.items():
        trained = train(
            model, sources, TOKENS, learning_rate=RATE, sequence_tokens=SEQUENCE_TOKENS, batch_sequences=4,
            precision="fp32", adapter=adapter, max_forward_kl=10.0, evaluate_every_steps=10_000,
        )  # fmt: skip
        assert trained.trained is not None
        report = json.loads(trained.store.read_file(trained.trained, "training.json"))
        bits = {f"{name}_before": value for name, value in report["curve"][0]["bits_per_byte"].items()}
        made[case] = bits | report["curve"][-1]["bits_per_byte"] | {"forward_kl": report["forward_kl"]}
    return made


def _base(work: Path, texts: list[str]) -> Path:
    """Pre-trained on the texts and written, in bf16."""
    model, folder = untrained_model(SHAPE, 0), work / "base"
    save_base(model, train_tokenizer(texts, SHAPE["vocabulary"], 1024), folder)
    packed = pack_texts("docstrings", texts, load_tokenizer(folder), SEQUENCE_TOKENS, 0)
    engine = LocalEngine(model, [Group("all", BASE_RATE, dict(model.named_parameters()))], 0.0, 1.0)
    asked = Train(tokens=BASE_TOKENS, batch_sequences=8, learning_rates=LearningRates(new_blocks=BASE_RATE),
                  precision="fp32", evaluate_every_steps=10_000, checkpoint_every_steps=10_000)  # fmt: skip
    run_loop(engine, Mixture([packed], [1.0], 8, 0), [], Plan.of(asked, SEQUENCE_TOKENS), Checkpoints(work / "state"),
             lambda moment: None)  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder
