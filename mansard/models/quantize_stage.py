"""Stage `quantize`: a model and calibration text become a 4-bit artifact that vLLM serves.

The output is a compressed-tensors checkpoint with the input's tokenizer and other small files, and `quantization.json`:
what was done and how far the artifact, read back from disk, is from its input on a probe. The first `samples` windows
of the text calibrate, the next `PROBE_WINDOWS` are the probe. Same inputs, same bytes; no times, no paths.
"""

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mansard.canonical import canonical_json
from mansard.errors import BadInput, StageFailed
from mansard.models.attention_kernels import choose_kernel
from mansard.models.distance import Distance, distance, probe_logits
from mansard.models.loading import choose_device, load_model, load_tokenizer
from mansard.models.quantizable import check_quantizable
from mansard.models.quantize import quantize_awq, release, save_quantized
from mansard.models.windows import first_windows
from mansard.records import SnapshotId
from mansard.specs.surgery import Quantize
from mansard.store.stream import file_lines

if TYPE_CHECKING:
    from mansard.worker import StageContext

CODE_VERSION = 3
PACKAGES = ("torch", "transformers", "llmcompressor", "compressed-tensors", "tokenizers", "safetensors")

PROBE_WINDOWS = 16


def run(context: "StageContext") -> SnapshotId:
    spec = context.spec
    store = context.store
    check_quantizable(store.manifest(context.inputs["model"]), Quantize.model_validate(dict(spec)))
    tree = context.work / "artifact"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    torch.manual_seed(spec["seed"])
    with store.using(context.inputs["model"]) as source:
        tokenizer = load_tokenizer(source)
        windows_WT = first_windows(
            tokenizer,
            file_lines(store, context.inputs["data"], "data.jsonl"),
            spec["samples"] + PROBE_WINDOWS,
            spec["sample_tokens"],
            f"calibration text {spec['source']!r}",
        )
        matrices, found, kernel = _quantize(source, tokenizer, windows_WT, tree, spec, context.progress)
    (tree / "quantization.json").write_bytes(canonical_json(_record(spec, matrices, found, kernel)))
    return store.snapshot(tree)


def _quantize(
    source: Path,
    tokenizer: Any,  # noqa: ANN401 - a transformers tokenizer
    windows_WT: torch.Tensor,
    tree: Path,
    spec: Mapping[str, Any],
    progress: Callable[..., None],
) -> tuple[int, Distance, str]:
    """Probe, quantize, write, read back, probe again by the same attention kernel. The input and the artifact are never
    in memory together."""
    calibration_WT, probe_WT = windows_WT[: spec["samples"]], windows_WT[spec["samples"] :]
    device = choose_device()
    model = load_model(source, dtype=None, device=device)
    longest = int(model.config.max_position_embeddings)
    if windows_WT.shape[1] > longest:
        raise BadInput(f"quantize.sample_tokens is {windows_WT.shape[1]}, but the model takes at most {longest} tokens")
    blocks = len(model.get_decoder().layers)
    total = blocks + 2
    progress(0, total, "blocks", "probing the input")
    kernel = choose_kernel(model, probe_WT.shape[1])
    reference = probe_logits(model, probe_WT, kernel)

    def told(done: int, of: int) -> None:
        progress(1 + done, total, "blocks", f"AWQ: block {done + 1} of {of}")

    quantize_awq(model, tokenizer, calibration_WT, spec, told)
    matrices = save_quantized(model, source, tree)
    release(model)
    progress(1 + blocks, total, "blocks", "probing the artifact")
    artifact = load_model(tree, dtype=None, device=device)
    found = distance(reference, probe_logits(artifact, probe_WT, kernel), probe_WT)
    if not all(math.isfinite(number) for number in _numbers(found).values()):
        raise StageFailed(f"the quantized model's answers on the probe are not finite: {found}; look at its input")
    progress(total, total, "blocks", "done", **_numbers(found))
    return matrices, found, kernel


def _record(spec: Mapping[str, Any], matrices: int, found: Distance, kernel: str) -> dict[str, Any]:
    return {
        "format": 1,
        "scheme": spec["scheme"],
        "group_size": spec["group_size"],
        "symmetric": spec["symmetric"],
        "matrices": matrices,
        "calibration": {"windows": spec["samples"], "window_tokens": spec["sample_tokens"]},
        "probe": {"windows": PROBE_WINDOWS, "window_tokens": spec["sample_tokens"], "kernel": kernel},
        **_numbers(found),
    }


def _numbers(found: Distance) -> dict[str, float]:
    """Four significant digits: below that lies float noise, which must not change the artifact's id."""
    return {
        "kl_nats_per_token": _rounded(found.kl_nats_per_token),
        "perplexity_input": _rounded(found.perplexity_reference),
        "perplexity_quantized": _rounded(found.perplexity_other),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
