"""Quantization on a GPU: batches of 8 windows that wait on the CPU (as it was) beside batches that fill the card.

    python tests/benchmarks/bench_quantize_gpu.py [--device cpu --small] [--profile]

A Llama of random weights in SmolLM2-135M's shape with 6 more blocks; each way twice, in turn, after a warm-up. Seconds
are those of `quantize_awq` alone; `differing` counts weights (of all) that the two ways leave differently, and
`apart` is the mean absolute difference of the weights over their mean size. The last line is JSON.
"""

import argparse
import cProfile
import json
import pstats
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))
from mansard.demo.base import train_tokenizer
from mansard.models import quantize
from mansard.models.loading import load_model, load_tokenizer

SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 36,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
SMALL = {**SHAPE, "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
SPEC = {"group_size": 64, "symmetric": False}  # 576 is no multiple of 128
PLACES = {"before": lambda model, windows_WT: (8, "cpu"), "after": quantize.calibration_place}


def write_model(shape: dict[str, Any], folder: Path) -> Path:
    """Random weights and a tokenizer: llm-compressor wants a model that came from a folder."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16).save_pretrained(folder)
    train_tokenizer(["def f(x): return x\n" * 50], 300, 2048).save_pretrained(folder)
    return folder


def settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def one_run(place: str, folder: Path, device: str, windows_WT: torch.Tensor) -> tuple[float, Any]:
    """(seconds, weights of the first and the last block on the CPU)."""
    tokenizer, model = load_tokenizer(folder), load_model(folder, None, device=torch.device(device))
    quantize.calibration_place = PLACES[place]
    settle(device)
    begun = time.monotonic()
    quantize.quantize_awq(model, tokenizer, windows_WT, SPEC, lambda done, of: None)
    settle(device)
    seconds = time.monotonic() - begun
    blocks = [model.model.layers[0], model.model.layers[-1]]
    weights = [p.detach().float().cpu() for b in blocks for n, p in b.named_parameters() if n.endswith("proj.weight")]
    quantize.release(model)
    return seconds, weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--profile", action="store_true", help="the functions that take longest, of the second way")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256)
    args = parser.parse_args()
    shape = SMALL if args.small else SHAPE
    windows = 16 if args.small else args.windows
    draw = torch.Generator().manual_seed(1)
    windows_WT = torch.randint(shape["vocab_size"], (windows, args.tokens), generator=draw)
    root = Path(tempfile.mkdtemp(prefix="mansard-bench-"))
    folder, warm_up = write_model(shape, root / "model"), write_model(SMALL, root / "warm-up")
    one_run("before", warm_up, args.device, windows_WT[:8] % SMALL["vocab_size"])
    seconds: dict[str, list[float]] = {"before": [], "after": []}
    weights = {}
    for place in ("before", "after", "before", "after"):
        taken, weights[place] = one_run(place, folder, args.device, windows_WT)
        print(f"{place}: {taken:.2f} s", flush=True)
        seconds[place].append(taken)
    if args.profile:
        profile = cProfile.Profile()
        profile.runcall(one_run, "after", folder, args.device, windows_WT)
        pstats.Stats(profile, stream=sys.stdout).sort_stats("cumulative").print_stats(60)
        pstats.Stats(profile, stream=sys.stdout).sort_stats("tottime").print_stats(40)
    shutil.rmtree(root)
    pairs = list(zip(weights["before"], weights["after"], strict=True))
    total = sum(one.numel() for one, _ in pairs)
    print(json.dumps({
        "bench": "quantize_gpu", "device": args.device, "blocks": shape["num_hidden_layers"], "windows": windows,
        "tokens": args.tokens, "seconds_before": min(seconds["before"]), "seconds_after": min(seconds["after"]),
        "ratio": min(seconds["before"]) / min(seconds["after"]), "all_seconds": seconds,
        "differing": sum(int((one != other).sum()) for one, other in pairs) / total,
        "apart": sum(float((one - other).abs().sum()) for one, other in pairs)
        / sum(float(one.abs().sum()) for one, _ in pairs),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
