"""Two GPUs of one host beside one: the shape of bench_training_gpu, the same rows on every GPU, FP8.

ZeRO-1 and ZeRO-2 are the site's own ways (mansard/training/deepspeed_engine.py). Plain data parallel is one engine a
GPU with the gradients of what trains averaged between them. The micro-batch is 2 rows, so that 80 GB cards hold it.
`--tiny` runs the plumbing on two CPU processes. The last line is JSON: one, zero1, zero2, plain (tokens a second), and
the ratios to one.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bench_training_gpu as single
import torch
from torch import distributed

from mansard.models.freeze import freeze_except
from mansard.specs.training import LearningRates, Train
from mansard.training.engines import LocalEngine
from mansard.training.optimizer import Group
from mansard.training.quantized_blocks import quantize_linears

ROOT = Path(__file__).resolve().parents[2]
WORLD = 2
ROWS, MICRO = 16, 2
WARM_STEPS, TIMED_STEPS = 2, 3
TINY = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2,
        "num_key_value_heads": 2, "num_hidden_layers": 8, "max_position_embeddings": 64, "head_dim": 32}  # fmt: skip


def shrink() -> None:
    """`--tiny`: the CPU's turn."""
    single.SHAPE.update(TINY)
    single.TOKENS = 64
    single.DEVICE = torch.device("cpu")


def make(world: int) -> tuple[Any, Group, Train]:
    """Model on this process's device, what trains of it, and the spec's section for `world` processes."""
    torch.set_num_threads(1)
    model = single.make_model(single.SHAPE["num_hidden_layers"] + single.NEW_BLOCKS)
    names = single.trained_names(model, single.new_indices())
    freeze_except(model, names)
    is_fp8 = single.DEVICE.type == "cuda"
    if is_fp8:
        quantize_linears(model.get_decoder().layers, True)
    section: dict[str, Any] = {"frozen": "fp8", "new_blocks": "fp8"} if is_fp8 else {}
    train = Train(tokens=world * ROWS * single.TOKENS, batch_sequences=world * ROWS, micro_batch_sequences=MICRO,
                  learning_rates=LearningRates(new_blocks=1e-5), **section)  # fmt: skip
    return model, Group("new_blocks", 1e-5, {n: p for n, p in model.named_parameters() if n in names}), train


def timed(engine: LocalEngine, rows: int, between: Any = None) -> float:
    """Tokens a second of all processes together."""
    data = single.batches(rows, WARM_STEPS + TIMED_STEPS)
    began = 0.0
    for step, batch in enumerate(data):
        if step == WARM_STEPS:
            began = _now()
        engine.gradients(batch)
        if between is not None:
            between()
        engine.step(1.0)
    return TIMED_STEPS * rows * single.TOKENS / (_now() - began)


def _now() -> float:
    if single.DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def one() -> float:
    model, group, _ = make(1)
    engine = LocalEngine(model, [group], 0.0, 1.0, micro_batch_sequences=MICRO)
    engine.objective.decoder.compile()
    return timed(engine, ROWS)


def plain() -> float:
    """Every process takes its own rows; what one step's gradients are is the mean."""
    model, group, _ = make(WORLD)
    engine = LocalEngine(model, [group], 0.0, 1.0, micro_batch_sequences=MICRO)
    engine.objective.decoder.compile()
    parameters = list(group.parameters.values())

    def average() -> None:
        for parameter in parameters:
            distributed.all_reduce(parameter.grad)
            parameter.grad.div_(WORLD)

    return WORLD * timed(engine, ROWS, average)


def zero(level: int) -> float:
    from mansard.training.deepspeed_engine import DeepSpeedEngine

    model, group, train = make(WORLD)
    config = json.loads((ROOT / f"configs/deepspeed/zero{level}.json").read_text())
    return timed(DeepSpeedEngine(model, [group], train, config, lambda what: None), WORLD * ROWS)


CASES = {"one": one, "zero1": lambda: zero(1), "zero2": lambda: zero(2), "plain": plain}


def run_case(name: str) -> None:
    """In one process, or as a rank of two."""
    if name != "one":
        rank = int(os.environ["LOCAL_RANK"])
        if single.DEVICE.type == "cuda":
            torch.cuda.set_device(rank)
            single.DEVICE = torch.device("cuda", rank)
        if name.startswith("zero"):
            import deepspeed

            deepspeed.init_distributed("nccl" if single.DEVICE.type == "cuda" else "gloo")
        else:
            distributed.init_process_group("nccl" if single.DEVICE.type == "cuda" else "gloo")
    speed = CASES[name]()
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps({name: speed}), flush=True)
    os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    if given.tiny:
        shrink()
    if given.case:
        run_case(given.case)
    found: dict[str, float] = {}
    for name in CASES:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}"] if name != "one" else []
        words = [sys.executable, *launcher, __file__, "--case", name, *(["--tiny"] if given.tiny else [])]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if not lines:
            print(f"{name}: no figure, status {done.returncode}", file=sys.stderr)
            continue
        found |= json.loads(lines[-1])
        print(name, found[name], file=sys.stderr, flush=True)
    ratios = {f"{name}_ratio": found[name] / found["one"] for name in ("zero1", "zero2", "plain") if name in found}
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(json.dumps({"device": where, **{n: round(v, 3) for n, v in (found | ratios).items()}}))
    return 0 if len(found) == len(CASES) else 1


if __name__ == "__main__":
    sys.exit(main())
