"""The one adapter around llm-compressor: AWQ (activation-aware scaling) to 4-bit weights with a scale a group.

The same model and the same windows give the same files: the windows come in the order given, nothing is shuffled, a CPU
computes on one thread, and what is written holds no time and no path. (One thread is also the quickest for a very small
model: 0.7 s against 12 s with two on a busy machine of two cores, 2026-11-22; 9.0 against 6.5 s at hidden 512. A large
model belongs on a GPU.) lm_head and the embeddings stay in the checkpoint's type. Source: Lin et al.,
AWQ, arXiv 2306.00978. Does not cover mixtures of experts.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy, QuantizationType
from llmcompressor import oneshot, reset_session
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mansard.errors import StageFailed
from mansard.models.probe import one_thread

BATCH_WINDOWS = 8
"""Windows of equal length go through the model together; the scales found do not depend on it but for rounding."""
SHARE_OF_FREE = 0.25
"""Of an accelerator's free memory: what one batch's activations may take; outputs before and after, and the weights
beside them, have the rest."""

_MADE_HERE = ("config.json", "recipe.yaml", "model.safetensors.index.json")


def quantize_awq(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows_WT: torch.Tensor,
    spec: Mapping[str, Any],
    told: Callable[[int, int], None],
) -> None:
    """Quantize every decoder matrix of `model` in place, in groups as `spec` says; `told` hears (block, blocks)."""
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=_weights(spec))}
    recipe = [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=["lm_head"])]
    batch_windows, offload_device = calibration_place(model, windows_WT)
    loader = DataLoader(
        [{"input_ids": window_T, "attention_mask": torch.ones_like(window_T)} for window_T in windows_WT],
        batch_size=batch_windows,
        shuffle=False,
    )
    reset_session()
    with one_thread(), _unpinned_without_accelerator(), _blocks_told(model, told):
        oneshot(
            model=model,
            processor=tokenizer,
            dataset=loader,
            recipe=recipe,
            num_calibration_samples=len(windows_WT),
            shuffle_calibration_samples=False,
            sequential_offload_device=offload_device,
        )


def _weights(spec: Mapping[str, Any]) -> QuantizationArgs:
    """4-bit integers in groups of a row's inputs."""
    return QuantizationArgs(
        num_bits=4,
        type=QuantizationType.INT,
        strategy=QuantizationStrategy.GROUP,
        group_size=spec["group_size"],
        symmetric=spec["symmetric"],
        dynamic=False,
    )


def calibration_place(model: PreTrainedModel, windows_WT: torch.Tensor) -> tuple[int, str]:
    """(windows a batch, where activations wait between blocks). An accelerator takes as many as fit and keeps them: a
    small model's launches cost more than its arithmetic, and each of AWQ's 20 ratios runs every batch. Not in float16,
    where the squared error of a large batch overflows."""
    device = model.device
    if device.type != "cuda" or model.dtype == torch.float16:
        return BATCH_WINDOWS, "cpu"
    free_bytes, _ = torch.cuda.mem_get_info(device)
    # Logits twice in two bytes; of the widest products some sixteen copies, half of them in float32 for a moment.
    token_bytes = 4 * int(model.config.vocab_size) + 32 * int(model.config.intermediate_size)
    fitting = int(free_bytes * SHARE_OF_FREE) // (token_bytes * windows_WT.shape[1])
    return max(1, min(fitting, len(windows_WT))), str(device)


def save_quantized(model: PreTrainedModel, source: Path, destination: Path) -> int:
    """Write the packed checkpoint, with the tokenizer and other small files of `source`; returns matrices packed.

    Reads back what was written: StageFailed when a decoder matrix was left unquantized.
    """
    model.save_pretrained(str(destination), save_compressed=True)
    (destination / "recipe.yaml").unlink(missing_ok=True)
    for file in sorted(source.rglob("*")):
        target = destination / file.relative_to(source)
        if file.is_file() and file.suffix != ".safetensors" and file.name not in _MADE_HERE:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    names = _tensor_names(destination)
    expected = {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and ".layers." in name
    }
    left = sorted(name for name in expected if f"{name}.weight_packed" not in names)
    if left or not expected:
        raise StageFailed(f"llm-compressor left {len(left)} of {len(expected)} matrices unquantized, e.g. {left[:1]}")
    return len(expected)


def release(model: PreTrainedModel) -> None:
    """Let go of a quantized model's tensors. Deleting the model does not: torch.fx's registry of traced functions and
    llm-compressor's session go on naming it."""
    for module in model.modules():
        for name in (*module._parameters, *module._buffers):
            delattr(module, name)
    reset_session()


def _tensor_names(tree: Path) -> set[str]:
    names: set[str] = set()
    for file in tree.glob("*.safetensors"):
        with file.open("rb") as opened:
            size_bytes = int.from_bytes(opened.read(8), "little")
            names |= json.loads(opened.read(size_bytes)).keys()
    return names


@contextlib.contextmanager
def _unpinned_without_accelerator() -> Iterator[None]:
    """llm-compressor 0.14 pins memory in its AWQ pass, which torch refuses where there is no accelerator."""
    if torch.accelerator.is_available():
        yield
        return
    original = IntermediatesCache.pin_memory
    IntermediatesCache.pin_memory = lambda self, batch_index, input_names=None: None
    try:
        yield
    finally:
        IntermediatesCache.pin_memory = original


@contextlib.contextmanager
def _blocks_told(model: PreTrainedModel, told: Callable[[int, int], None]) -> Iterator[None]:
    """Tell `told` when a decoder block sees its first batch."""
    blocks = model.get_decoder().layers
    reached: set[int] = set()

    def tell(number: int) -> None:
        if number not in reached:
            reached.add(number)
            told(len(reached) - 1, len(blocks))

    hooks = [
        block.register_forward_pre_hook(lambda module, inputs, number=number: tell(number))
        for number, block in enumerate(blocks)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
