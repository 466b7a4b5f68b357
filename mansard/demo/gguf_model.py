"""A GGUF file as a plain Hugging Face folder in bf16, by transformers' own reader (needs the package `gguf`).

`python -m mansard.demo.gguf_model FILE FOLDER`. What was quantized once stays as exact as its 4 bits were; the same
file gives the same tensors under other versions of Python and torch (measured 2026-11-30: 3.11 / 2.13, 3.12 / 2.11).
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(file: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    if hasattr(model.config, "quantization_config"):  # how the file was packed, which the tensors no longer are
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
