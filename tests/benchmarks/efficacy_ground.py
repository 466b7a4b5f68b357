"""What efficacy.py stands on: real text that is installed here, and a base pre-trained on the general part of it."""

import hashlib
import math
import random
import sys
import sysconfig
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mansard.demo.base import INITIAL_STD, save_base, train_tokenizer, untrained_model
from mansard.models.loading import load_model, load_tokenizer
from mansard.training.data import Mixture, Packed, pack_texts
from mansard.training.engines import LocalEngine, ModelEngine
from mansard.training.optimizer import Group, Schedule

SUFFIXES = {"general": (".py",), "domain": (".h", ".hpp", ".cuh", ".c", ".cpp")}
GENERATED = ("/ops/", "/test/", "/tests/", "_pb2", "/testing/")
"""Thousands of files of one pattern teach only that pattern."""
HELD_OUT = 20
"""One file in so many is held out, by its text's digest."""


@dataclass(frozen=True, slots=True)
class Scale:
    shape: dict[str, int]
    dtype: torch.dtype
    new_blocks: int
    base_tokens: int
    base_batch: int
    base_rate: float
    tokens: int
    sequence: int
    batch: int
    micro: int | None
    general_bytes: int
    domain_bytes: int
    held_out_rows: int
    initial_std: float

    def tiny(self) -> "Scale":
        return replace(self, base_tokens=16_384, tokens=4_096, general_bytes=400_000, domain_bytes=400_000,
                       held_out_rows=4)  # fmt: skip


FULL = Scale(
    {"vocabulary": 8192, "hidden": 512, "intermediate": 1408, "blocks": 12, "heads": 8, "max_tokens": 512},
    torch.bfloat16, 4, 120_000_000, 64, 1.5e-3, 6_000_000, 512, 32, None, 80_000_000, 20_000_000, 128, 0.02,
)  # fmt: skip
SMALL = Scale(
    {"vocabulary": 2048, "hidden": 128, "intermediate": 384, "blocks": 8, "heads": 2, "max_tokens": 256},
    torch.float32, 2, 2_000_000, 8, 3e-3, 200_000, 256, 4, None, 8_000_000, 3_000_000, 16, 0.05,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ground:
    scale: Scale
    work: Path
    base: Path
    training: dict[str, Packed]
    held_out: dict[str, Packed]
    device: torch.device

    def bits(self, engine: ModelEngine, is_pilot: bool = False) -> dict[str, float]:
        """Bits per byte on held-out text. What settings are chosen by, the pilot's, are rows that are not reported."""
        found = {}
        for name, packed in self.held_out.items():
            rows = self.rows(name, is_pilot)
            loss = engine.evaluate([packed.batch(rows[i : i + 16]) for i in range(0, len(rows), 16)])
            found[name] = loss.mean / math.log(2) / packed.bytes_per_token
        return found

    def rows(self, name: str, is_pilot: bool) -> range:
        """The rows of a held-out text that are reported, or as many behind them, by which settings are chosen."""
        count = min(self.scale.held_out_rows, len(self.held_out[name]) // 2)
        if count == 0:
            raise SystemExit(f"{name}: {len(self.held_out[name])} held-out rows, 2 are needed at the least; add text")
        return range(count, 2 * count) if is_pilot else range(count)

    def base_bits(self) -> dict[str, float]:
        return self.bits(ModelEngine(load_model(self.base, self.scale.dtype, device=self.device), None))


def make_ground(scale: Scale, work: Path) -> Ground:
    device = device_of(scale)
    texts = {"general": read("general", scale.general_bytes), "domain": read("domain", scale.domain_bytes)}
    base = work / "base"
    if not (base / "model.safetensors").exists():  # written last
        tokenizer = train_tokenizer(texts["general"][0][:2000], scale.shape["vocabulary"], scale.shape["max_tokens"])
        tokenizer.save_pretrained(base)
    tokenizer = load_tokenizer(base)
    training, held_out = {}, {}
    for name, (learned, kept) in texts.items():
        training[name] = pack_texts(name, learned, tokenizer, scale.sequence, 0)
        held_out[name] = pack_texts(name, kept, tokenizer, scale.sequence, 0)
        print(f"{name}: {training[name].tokens_RT.size:,} tokens, {held_out[name].tokens_RT.size:,} held out",
              file=sys.stderr, flush=True)  # fmt: skip
    ground = Ground(scale, work, base, training, held_out, device)
    if not (base / "model.safetensors").exists():
        pretrain(ground, tokenizer)
    return ground


def device_of(scale: Scale) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and scale.dtype == torch.bfloat16 else "cpu")


def on_this_machine(ground: Ground) -> Ground:
    """A ground that was kept, read again."""
    return replace(ground, device=device_of(ground.scale))


def pretrain(ground: Ground, tokenizer: Any) -> None:
    scale = ground.scale
    model = untrained_model(scale.shape, 0)
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.dim() > 1):
            weight.mul_(INITIAL_STD**-1 * scale.initial_std)
    model = model.to(ground.device, scale.dtype)
    engine = LocalEngine(model, [Group("base", scale.base_rate, dict(model.named_parameters()))], 0.1, 1.0)
    engine.objective.decoder.compile()  # on a GPU, as the trainer does
    mixture = Mixture([ground.training["general"]], [1.0], scale.base_batch, 0)
    steps = scale.base_tokens // (scale.base_batch * scale.sequence)
    schedule, began = Schedule(steps, steps // 20), time.perf_counter()
    for step in range(steps):
        loss = engine.gradients(mixture.batch(step)).mean
        engine.step(schedule.factor(step))
        if step % max(1, steps // 20) == 0:
            taken = time.perf_counter() - began
            print(f"base: step {step} of {steps}, loss {loss:.3f}, {taken:.0f} s", file=sys.stderr, flush=True)
    save_base(model, tokenizer, ground.base)


def read(name: str, most_bytes: int) -> tuple[list[str], list[str]]:
    """(training, held-out) texts: files without a double, in an order of their digests."""
    found: dict[str, str] = {}
    for path in _files(SUFFIXES[name]):
        text = path.read_bytes().decode(errors="ignore")[:100_000]
        if len(text) > 500:
            found[hashlib.sha256(text.encode()).hexdigest()] = text
    ordered = [(digest, found[digest]) for digest in sorted(found)]
    random.Random(0).shuffle(ordered)
    learned: list[str] = []
    kept: list[str] = []
    size = 0
    for digest, text in ordered:
        if size > most_bytes:
            break
        size += len(text)
        (kept if int(digest[:8], 16) % HELD_OUT == 0 else learned).append(text)
    return learned, kept


def _files(suffixes: tuple[str, ...]) -> Iterable[Path]:
    roots = {
        Path(sysconfig.get_path("purelib")),
        Path(sysconfig.get_path("stdlib")),
        Path(torch.__file__).parent.parent,
    }
    for root in sorted(roots):
        for path in sorted(root.rglob("*")):
            if path.suffix in suffixes and path.is_file() and not any(part in path.as_posix() for part in GENERATED):
                yield path
