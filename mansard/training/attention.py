"""Attention over packed rows, exact and without padding: a token sees its own segment's past and nothing else.

On a CPU rows of one whole document run as plain causal attention, packed ones with a mask (short rows in float32 go
through `short_attention`). On an accelerator no mask is made in 16 bits: rows of one whole document run as plain causal
attention (cuDNN's first: 599 TFLOP/s forward and 501 backward on an H200, flash attention 322 and 258), packed ones as
variable-length attention between the segments' ends (321 and 276; all measured 2026-11-25). A model whose scores are
capped keeps the eager attention it was loaded with, because neither kernel caps. Legend: B rows, T tokens,
H heads, D head width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from mansard.models.attention_kernels import attention_by, training_kernel
from mansard.training.packing import masks_of
from mansard.training.short_attention import is_short, short_attention

NAME = "mansard_packed"
VARIABLE_LENGTH_TYPES = (torch.float16, torch.bfloat16)
"""What torch's variable-length attention takes; packed rows in float32 have a mask, on an accelerator, too."""


def use_packed_attention(model: Any) -> None:  # noqa: ANN401 - a transformers model
    """Let `model` (modified) take `packed_attention`, where it computes the model's function."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, packed_attention)
        model.set_attn_implementation(NAME)


def attention_inputs(
    config: Any,  # noqa: ANN401 - a transformers config
    positions_BT: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    """The keyword arguments of a decoder's forward pass that say what each token sees; positions are on the CPU."""
    whole = whole_rows(positions_BT)
    window = getattr(config, "sliding_window", None)
    is_windowed = window is not None and window < positions_BT.shape[1]
    if config._attn_implementation != NAME:
        return {"attention_mask": masks_of(config, positions_BT.to(device), dtype)}
    if whole == len(positions_BT) and not is_windowed:
        return {"attention_mask": None}
    if device.type == "cuda" and dtype in VARIABLE_LENGTH_TYPES:
        return {"attention_mask": None, "ends": segment_ends(positions_BT).to(device, non_blocking=True)}
    if is_windowed:
        return {"attention_mask": masks_of(config, positions_BT.to(device), dtype)}
    return {"attention_mask": masks_of(config, positions_BT[whole:].to(device), dtype), "whole": whole}


def whole_rows(positions_BT: torch.Tensor) -> int:
    """How many rows at the start are one segment each (`Batch.whole_first` brings those there)."""
    is_packed_B = (positions_BT[:, 1:] == 0).any(dim=1)
    return int(is_packed_B.int().argmax()) if bool(is_packed_B.any()) else len(positions_BT)


def segment_ends(positions_BT: torch.Tensor) -> torch.Tensor:
    """Where segments end in the flattened rows, from 0: int32, filled up with the last end to a power of two, so that
    compiled blocks see few sizes (segments without tokens cost nothing)."""
    starts = torch.nonzero(positions_BT.flatten() == 0).flatten().to(torch.int32)
    size = 1 << len(starts).bit_length()
    ends = torch.full((size + 1,), positions_BT.numel(), dtype=torch.int32)
    ends[: len(starts)] = starts
    return ends


@contextmanager
def preferred_kernels(device: torch.device) -> Iterator[None]:
    """cuDNN's attention first while the context lasts, on an accelerator."""
    with attention_by(training_kernel(device), device):
        yield


def packed_attention(
    module: torch.nn.Module,
    query_BHTD: torch.Tensor,
    key_BHTD: torch.Tensor,
    value_BHTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    ends: torch.Tensor | None = None,
    whole: int = 0,
    sliding_window: int | None = None,
    **others: Any,  # noqa: ANN401 - what transformers passes on
) -> tuple[torch.Tensor, None]:
    """What transformers calls; [B, T, H, D]."""
    if ends is None:
        dropout = others.get("dropout", 0.0)

        def attend(rows: slice, mask: torch.Tensor | None) -> torch.Tensor:
            states = (query_BHTD[rows], key_BHTD[rows], value_BHTD[rows])
            mixed: torch.Tensor = sdpa_attention_forward(module, *states, mask, scaling=scaling, dropout=dropout)[0]
            return mixed

        if is_short(query_BHTD, key_BHTD) and dropout == 0.0:
            repeats = query_BHTD.shape[1] // key_BHTD.shape[1]
            key_BHTD, value_BHTD = repeat_kv(key_BHTD, repeats), repeat_kv(value_BHTD, repeats)
            whole = len(query_BHTD) if attention_mask is None else whole
            scale = query_BHTD.shape[-1] ** -0.5 if scaling is None else scaling
            dtype = getattr(module, "products", torch.float32)
            return short_attention(query_BHTD, key_BHTD, value_BHTD, attention_mask, whole, scale, dtype), None
        if whole == 0:
            return attend(slice(None), attention_mask), None
        return torch.cat([attend(slice(whole), None), attend(slice(whole, None), attention_mask)]), None
    from torch.nn.attention.varlen import varlen_attn

    rows, heads, tokens, width = query_BHTD.shape
    repeats = heads // key_BHTD.shape[1]
    flat = [
        repeat_kv(x, 1 if x is query_BHTD else repeats).transpose(1, 2).reshape(rows * tokens, heads, width)
        for x in (query_BHTD, key_BHTD, value_BHTD)
    ]
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    mixed = varlen_attn(*flat, ends, ends, tokens, tokens, scale=scaling, window_size=window)
    return mixed.view(rows, tokens, heads, width), None
