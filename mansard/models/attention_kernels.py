"""Which of torch's attention kernels a forward pass runs with, by name, so that two processes compute the same numbers.

Left alone, torch takes what its process prefers, and processes differ: on Hopper a fresh one takes cuDNN's kernel, one
that entered `sdpa_kernel(..., set_priority=True)` before its first attention call keeps flash attention first (torch
2.11; the same model's logits differed by 1.14, KL 1.1e-3, 2026-11-30). So whoever computes numbers to compare chooses a
kernel once (`choose_kernel`), writes its name into its record, and both sides run under `attention_by` that name.

A name is `cpu` (a CPU's own preference: flash attention, else `math`), `eager` (the model's own products, on an
accelerator), or kernels in the order in which they are tried: `flash`, `cudnn,flash,efficient,math`. Does not cover
vLLM. H heads, T tokens, D head width.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mansard.errors import BadInput, StageFailed

CPU, EAGER = "cpu", "eager"
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
COMPARABLE = ("flash", "efficient", "math")
"""The first that takes the model's type, head width and masks; cuDNN's kernel is left to training, where it is faster:
its plans are chosen by heuristics of its own, and `math` takes everything."""
FASTEST = "cudnn,flash,efficient,math"
ALIASES = {CPU: "flash,math"}

_REFUSALS = ("No available kernel", "No viable backend")


def choose_kernel(model: Any, num_tokens: int) -> str:  # noqa: ANN401 - a transformers model
    """The kernel by which `model` is compared on rows of up to `num_tokens`: the first of COMPARABLE that runs."""
    if model.device.type == "cpu":
        return CPU
    if model.config._attn_implementation == "eager":
        return EAGER
    return next(kernel for kernel in COMPARABLE if _runs(kernel, model, num_tokens))


def training_kernel(device: torch.device) -> str:
    """What training runs with: the fastest that takes what it is given, named all the same."""
    return CPU if device.type == "cpu" else FASTEST


@contextmanager
def attention_by(kernel: str, device: torch.device) -> Iterator[None]:
    """Attention runs with `kernel` alone while the context lasts. BadInput for a name that is none or not for this kind
    of device; StageFailed where this machine's torch has no such kernel for what the model computes."""
    if (kernel == CPU) != (device.type == "cpu"):
        raise BadInput(f"attention kernel: the numbers to compare with were computed by {kernel!r}, this process runs "
                       f"on {device.type!r}; run it where they were computed, or compute them again")  # fmt: skip
    names = ALIASES.get(kernel, kernel).split(",") if kernel != EAGER else []
    unknown = [name for name in names if name not in BACKENDS]
    if unknown:
        raise BadInput(f"attention kernel: {unknown[0]!r} is not one of {CPU}, {EAGER}, {', '.join(BACKENDS)}")
    backends = [BACKENDS[name] for name in names]
    try:
        with sdpa_kernel(backends, set_priority=len(backends) > 1) if backends else nullcontext():
            yield
    except RuntimeError as error:
        if not _is_refusal(error):
            raise
        raise StageFailed(f"attention kernel: {kernel!r} was recorded, and this machine cannot run it for this "
                          "model; run it where that was computed, or compute it again") from error  # fmt: skip


def _runs(kernel: str, model: Any, num_tokens: int) -> bool:  # noqa: ANN401 - a transformers model
    """Whether the model's attention, as transformers calls it, takes this kernel with each of its masks."""
    config = model.config
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    query_1HTD = torch.zeros(1, heads, num_tokens, width, dtype=model.dtype, device=model.device)
    key_1HTD = query_1HTD[:, :kv_heads].clone()
    module: Any = SimpleNamespace(num_key_value_groups=heads // kv_heads, is_causal=True)
    window = getattr(config, "sliding_window", None)
    masks: list[torch.Tensor | None] = [None]
    if window is not None and window < num_tokens:
        masks.append(torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=model.device).tril()[None, None])
    with torch.inference_mode(), warnings.catch_warnings(), sdpa_kernel([BACKENDS[kernel]]):
        warnings.simplefilter("ignore")  # torch says why a kernel refuses
        for mask in masks:
            try:
                sdpa_attention_forward(module, query_1HTD, key_1HTD, key_1HTD, mask)
            except RuntimeError as error:
                if not _is_refusal(error):
                    raise
                return False
    return True


def _is_refusal(error: RuntimeError) -> bool:
    return str(error).startswith(_REFUSALS)
