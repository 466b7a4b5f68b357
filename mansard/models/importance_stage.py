"""Stage `importance`: what each block of a model is worth to general text (ADEPT, arXiv 2510.10071).

Inputs: `model`, and `data.SOURCE.train` for each source of general text; spec: `specs.Probe`. Output: importance.json
with the model's loss on the probe and what it gains without each block, in nats a token, in the checkpoint's type. Six
significant digits: below that lies float noise, which must not place a block.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mansard.canonical import canonical_json
from mansard.errors import BadInput, StageFailed
from mansard.models.attention_kernels import choose_kernel
from mansard.models.importance import losses
from mansard.models.loading import choose_device, load_model, load_tokenizer
from mansard.models.placement import IMPORTANCE_FILE
from mansard.models.windows import first_windows
from mansard.records import SnapshotId
from mansard.specs.surgery import NO_GENERAL_TEXT, Probe
from mansard.store.stream import shuffled_lines

if TYPE_CHECKING:
    from mansard.worker import StageContext

CODE_VERSION = 2
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")

ROWS_AT_ONCE = 4
"""Their states are kept for every block of the model while they are weighed."""


def run(context: "StageContext") -> SnapshotId:
    probe = Probe.model_validate(dict(context.spec))
    with context.store.using(context.inputs["model"]) as path:
        ids_BT = _rows(context, probe, path)
        loss, gains, kernel = _weigh(context, path, ids_BT)
    if not all(map(math.isfinite, (loss, *gains))):
        raise StageFailed(f"the losses on the probe are not finite ({loss}); look at the model")
    record = {
        "format": 1,
        "loss": _rounded(loss),
        "gains": [_rounded(gain) for gain in gains],
        "probe": {"rows": len(ids_BT), "tokens": probe.tokens, "seed": probe.seed, "kernel": kernel},
    }
    return context.store.put_files({IMPORTANCE_FILE: canonical_json(record)})


def _rows(context: "StageContext", probe: Probe, path: Path) -> torch.Tensor:
    """The probe's token ids, `probe.rows` rows of each source."""
    names = sorted(name for name in context.inputs if name.startswith("data."))
    if not names:
        raise BadInput(NO_GENERAL_TEXT)
    tokenizer = load_tokenizer(path)
    rows = []
    for name in names:
        lines = shuffled_lines(context.store, context.inputs[name], "data.jsonl", f"{probe.seed}:{name}")
        keys = "expand.probe.rows or expand.probe.tokens"
        rows.append(first_windows(tokenizer, lines, probe.rows, probe.tokens, name, keys))
    return torch.cat(rows)


def _weigh(context: "StageContext", path: Path, ids_BT: torch.Tensor) -> tuple[float, list[float], str]:
    """The loss and what it gains without each block, in nats a token, and the attention kernel of both."""
    model = load_model(path, None, device=choose_device())
    longest = int(model.config.max_position_embeddings)
    if ids_BT.shape[1] > longest:
        raise BadInput(f"expand.probe.tokens is {ids_BT.shape[1]}, but the model takes at most {longest} tokens")
    depth = len(model.get_decoder().layers)
    total = len(ids_BT) * depth
    whole, without = 0.0, [0.0] * depth
    kernel = choose_kernel(model, ids_BT.shape[1])
    context.progress(0, total, "rows", f"leaving out each of {depth} blocks")
    for begin in range(0, len(ids_BT), ROWS_AT_ONCE):
        batch_BT = ids_BT[begin : begin + ROWS_AT_ONCE]

        def told(block: int, begin: int = begin, rows: int = len(batch_BT)) -> None:
            context.progress(begin * depth + (block + 1) * rows, total, "rows", f"without block {block}")

        nats, nats_without = losses(model, batch_BT, kernel, told)
        whole += nats
        without = [a + b for a, b in zip(without, nats_without, strict=True)]
    tokens = len(ids_BT) * (ids_BT.shape[1] - 1)
    return whole / tokens, [(nats - whole) / tokens for nats in without], kernel


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
