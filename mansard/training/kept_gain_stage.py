"""Stage `kept-gain`: what an average keeps of its training's gain, and what it costs, on text nobody trained on.

Inputs: `base`, `expanded` (what stage `fuse` made), `averaged`, and texts: `data.SOURCE.held_out`, `suite.SUITE` (those
in bits per byte). Spec: {"weight": of the average, "sequence_tokens": a row's, "gains": the texts that should gain,
"guards": those that must not lose}. Output: fusion.json with bits per byte of each text that fills a row by each of the
three models, unquantized; of a gain text the share kept, (averaged - base) / (expanded - base), none where nothing was
gained; of a guard the loss, averaged - base. It names the base's tensors that the average changed.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from mansard.canonical import canonical_json
from mansard.errors import BadInput, StageFailed
from mansard.models.attention_kernels import training_kernel
from mansard.models.loading import choose_device, load_model, load_tokenizer
from mansard.models.model_files import weight_files
from mansard.records import SnapshotId
from mansard.training.data import Packed, pack_texts, read_texts
from mansard.training.engines import CPU_THREADS, ModelEngine

if TYPE_CHECKING:
    from mansard.worker import StageContext

CODE_VERSION = 2
PACKAGES = ("numpy", "safetensors", "tokenizers", "torch", "transformers")

FUSION_FILE = "fusion.json"
MODELS = ("base", "expanded", "averaged")
ROWS = 128
"""Of each text, evenly spaced: 32 k tokens at 256 a row."""
ROWS_AT_ONCE = 8


def run(context: "StageContext") -> SnapshotId:
    torch.set_num_threads(CPU_THREADS)
    gains, guards = context.spec["gains"], context.spec["guards"]
    texts = _texts(context, [*gains, *guards])
    bits = {who: _measured(context, who, texts) for who in MODELS}
    found = {text.name: {who: bits[who][text.name] for who in MODELS} for text in texts}
    told = {name: _gain(each) if name in gains else _guard(each) for name, each in found.items()}
    context.progress(len(texts) * len(MODELS), len(texts) * len(MODELS), "texts", "done", **_metrics(told))
    record = {
        "format": 1,
        "method": "average",
        "weight": context.spec["weight"],
        "kernel": training_kernel(choose_device()),
        "texts": told,
        "too_short": [name for name in (*gains, *guards) if name not in told],
        "changed_base_tensors": changed_tensors(context),
    }
    return context.store.put_files({FUSION_FILE: canonical_json(record)})


def changed_tensors(context: "StageContext") -> list[str]:
    """The base's tensors that the averaged model holds otherwise."""
    before, after = (_digests(context, who) for who in ("base", "averaged"))
    if before.keys() != after.keys():
        raise BadInput("base and averaged: other tensors in each; the base of the expansion is expected as base")
    return sorted(name for name, digest in before.items() if after[name] != digest)


def _digests(context: "StageContext", who: str) -> dict[str, str]:
    files = weight_files(context.store.manifest(context.inputs[who]))
    return {name: digest for file in files.values() for name, digest in file.tensors.items()}


def _texts(context: "StageContext", names: Sequence[str]) -> list[Packed]:
    """Those that fill a row."""
    with context.store.using(context.inputs["base"]) as path:
        tokenizer = load_tokenizer(path)
    packed = []
    for name in names:
        file = "items.jsonl" if name.startswith("suite.") else "data.jsonl"
        texts = read_texts(context.store.read_file(context.inputs[name], file), name)
        packed.append(pack_texts(name, texts, tokenizer, context.spec["sequence_tokens"], 0))
    return [text for text in packed if len(text.tokens_RT)]


def _measured(context: "StageContext", who: str, texts: Sequence[Packed]) -> dict[str, float]:
    """Bits per byte of each text by one model, which leaves memory before the next one comes."""
    with context.store.using(context.inputs[who]) as path:
        engine = ModelEngine(load_model(path, None, device=choose_device()), ROWS_AT_ONCE)
    bits = {}
    for number, text in enumerate(texts):
        done = MODELS.index(who) * len(texts) + number
        context.progress(done, len(MODELS) * len(texts), "texts", f"{text.name} by the {who} model")
        count = len(text.tokens_RT)
        loss = engine.evaluate([text.batch(sorted({i * count // ROWS for i in range(ROWS)}))])
        if not math.isfinite(loss.nats):
            raise StageFailed(f"the {who} model's loss on {text.name} is {loss.nats}; a finite number is expected")
        bits[text.name] = float(f"{loss.mean / math.log(2) / text.bytes_per_token:.6g}")  # below that lies float noise
    return bits


def _gain(found: dict[str, float]) -> dict[str, Any]:
    gained = found["base"] - found["expanded"]
    return {**found, "kept_share": (found["base"] - found["averaged"]) / gained if gained > 0.0 else None}


def _guard(found: dict[str, float]) -> dict[str, Any]:
    return {**found, "loss": found["averaged"] - found["base"]}


def _metrics(told: dict[str, dict[str, Any]]) -> dict[str, float]:
    """For MLflow: kept_share_TEXT and guard_loss_TEXT, where there is one."""
    found = {f"kept_share_{name}": text.get("kept_share") for name, text in told.items()}
    found |= {f"guard_loss_{name}": text.get("loss") for name, text in told.items()}
    return {name: float(value) for name, value in found.items() if value is not None}

