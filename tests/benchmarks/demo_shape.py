"""The demo's upgrade, made for a benchmark: a base of its shape, four inserted blocks, real text, packed rows."""

import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mansard.demo.base import save_base, train_tokenizer, untrained_model
from mansard.demo.corpus import listed_files, read_domains, up_to
from mansard.models.expand import apply, plan
from mansard.models.loading import load_model, load_tokenizer
from mansard.models.model_files import model_config
from mansard.specs.data import Data, Source
from mansard.specs.surgery import Expand
from mansard.specs.training import LearningRates, Train
from mansard.store.store import Store
from mansard.training.blocks import Names, checkpoint_names
from mansard.training.data import Mixture, Packed, pack_texts

SHAPE = {"vocabulary": 2048, "hidden": 128, "intermediate": 384, "blocks": 4, "heads": 2, "max_tokens": 1024}
NEW_BLOCKS = 4
SEQUENCE_TOKENS = 256
BATCH_SEQUENCES = 4
TEXT_BYTES = 400_000


def train_section(steps: int, **others: Any) -> Train:
    rates = LearningRates(new_blocks=2e-3)
    return Train(tokens=steps * BATCH_SEQUENCES * SEQUENCE_TOKENS, batch_sequences=BATCH_SEQUENCES,
                 learning_rates=rates, precision="fp32", **others)  # fmt: skip


def data_section() -> Data:
    sources = [Source(name=n, train=n, held_out=n, weight=0.5, is_domain=n == "code") for n in ("code", "docstrings")]
    return Data(sources=sources, sequence_tokens=SEQUENCE_TOKENS)


@dataclass(frozen=True, slots=True)
class Upgrade:
    """A base and its expansion on disk, which of its tensors train, and its mixture."""

    base: Path
    folder: Path
    names: Names
    mixture: Mixture
    held_out: list[Packed]

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        return load_model(self.folder, dtype)


def make_upgrade(work: Path) -> Upgrade:
    domains = read_domains(Path(sysconfig.get_path("stdlib")), listed_files(Path(sysconfig.get_path("stdlib"))))
    texts = {name: [d.text for d in up_to(domains[name], TEXT_BYTES, 0)] for name in ("code", "docstrings")}
    base = work / "base"
    save_base(untrained_model(SHAPE, 0), train_tokenizer(texts["docstrings"], SHAPE["vocabulary"], 1024), base)
    store = Store(work / "store")
    taken = store.snapshot(base)
    expansion = apply(store, taken, plan(model_config(store, taken), Expand(blocks=NEW_BLOCKS)))
    folder = store.materialize(expansion)
    tokenizer = load_tokenizer(folder)
    packed = [pack_texts(name, found, tokenizer, SEQUENCE_TOKENS, 0) for name, found in texts.items()]
    mixture = Mixture(packed, [0.5, 0.5], BATCH_SEQUENCES, 0)
    return Upgrade(base, folder, checkpoint_names(store, expansion), mixture, packed)
