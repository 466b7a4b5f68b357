"""The one adapter around transformers for model directories: every stage loads the same way.

Local files only, safetensors only, never the checkpoint's own Python code. A checkpoint whose tensors are not exactly
those that the architecture asks for is refused (transformers would fill the gap with random numbers and only warn).
Does not cover serving (vLLM loads by itself) or weights on several devices.
"""

from pathlib import Path
from typing import Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mansard.errors import BadInput
from mansard.store.snapshot import CONFIG_FILE, read_json_object

Attention = Literal["eager", "sdpa"]


def choose_device() -> torch.device:
    """The first accelerator where there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def load_model(
    path: Path, dtype: torch.dtype | None, attention: Attention | None = None, device: torch.device | None = None
) -> PreTrainedModel:
    """The causal language model at `path`, in eval mode, on `device` (default: the CPU).

    `attention` None takes what computes the model's function (`attention_of`); `dtype` None keeps the type that the
    checkpoint's config names. Raises BadInput when the directory is not a model that transformers knows, or when
    tensors are missing, left over or of another shape.
    """
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            str(path),
            dtype="auto" if dtype is None else dtype,
            attn_implementation=attention or attention_of(path),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{path}: transformers cannot load this model: {one_line(error)}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[what]:
            names = ", ".join(sorted(str(n) for n in found[what])[:3])
            kind = what.removesuffix("_keys")
            raise BadInput(f"{path}: {len(found[what])} {kind} tensors, e.g. {names}; config and weights must agree")
    model.eval()
    return model if device is None else model.to(device)


def attention_of(path: Path) -> Attention:
    """sdpa, or eager where the scores are capped (Gemma-2): torch's attention leaves the cap out without a word, and
    vLLM, which serves the model, does not."""
    config = read_json_object((path / CONFIG_FILE).read_bytes(), str(path / CONFIG_FILE))
    return "sdpa" if config.get("attn_logit_softcapping") is None else "eager"


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights; BadInput when there is none."""
    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{path}: transformers cannot load this tokenizer: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """An exception's message on one line (transformers' run over many)."""
    return " ".join(str(error).split())[:400]
