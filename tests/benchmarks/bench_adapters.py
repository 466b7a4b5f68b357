"""What trains and what is held, with whole new blocks and with LoRA, DoRA and QLoRA on them, one process a case.

On a CPU the demo's shape in float32; on a GPU Llama-2-7B's shape with 8 even new blocks, sequence 4096, one row a
micro-batch, bf16, random weights. Rank 16 on every linear of the new blocks. `weights_mb` are the model's as they stand
in memory, `checkpoint_mb` is what a checkpoint holds (what trains in float32, its moments); on a GPU `peak_gib` is
torch's, and `forecast_error` the preflight's memory over it. On a CPU adapters_learning.py then says what each learns.
The last line is JSON.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mansard.specs.training import LearningRates, Train
from mansard.training.adapters import train_adapters
from mansard.training.blocks import Names, names_in, train_only
from mansard.training.data import Batch
from mansard.training.engines import CPU_THREADS, LocalEngine
from mansard.training.preflight import preflight

CASES = ("whole", "lora", "dora", "qlora")
RANK = 16
WARM_STEPS, TIMED_STEPS = 2, 8


def adapter_of(case: str) -> dict[str, Any] | None:
    return None if case == "whole" else {"method": case, "rank": RANK, "alpha": 2.0 * RANK}


def section(case: str, precision: str, rows: int, tokens: int) -> Train:
    return Train.model_validate(
        {"tokens": rows * tokens, "batch_sequences": rows, "learning_rates": LearningRates(new_blocks=1e-4),
         "precision": precision, "adapter": adapter_of(case)}
    )  # fmt: skip


def measured(model: Any, names: Names, train: Train, batches: Sequence[Batch], device: torch.device) -> dict[str, Any]:
    if train.adapter is None:
        groups, _ = train_only(model, names, train.learning_rates)
    else:
        groups, _ = train_adapters(model, names, train, device)
    engine = LocalEngine(model, groups, 0.0, 1.0)
    forecast = preflight(engine, batches[0], train)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(WARM_STEPS + TIMED_STEPS):
        if step == WARM_STEPS:
            began = time.perf_counter()
        engine.gradients(batches[step % len(batches)])
        engine.step(1.0)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / TIMED_STEPS
    held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    figures = {
        "trains": sum(p.numel() for group in groups for p in group.parameters.values()),
        "weights_mb": sum(held.values()) / 1e6,
        "checkpoint_mb": sum(tensor.nbytes for tensor in engine.state().values()) / 1e6,
        "tokens_per_second": batches[0].tokens_BT.numel() / seconds,
    }
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        figures |= {"peak_gib": peak / 2**30, "forecast_error": forecast.peak_bytes / peak - 1}
    return figures


def on_cpu(case: str) -> dict[str, Any]:
    from demo_shape import BATCH_SEQUENCES, SEQUENCE_TOKENS, make_upgrade

    torch.set_num_threads(CPU_THREADS)
    with tempfile.TemporaryDirectory() as folder:
        upgrade = make_upgrade(Path(folder))
        train = section(case, "fp32", BATCH_SEQUENCES, SEQUENCE_TOKENS)
        batches = [upgrade.mixture.batch(step) for step in range(TIMED_STEPS)]
        return measured(upgrade.model(), upgrade.names, train, batches, torch.device("cpu"))


def on_gpu(case: str) -> dict[str, Any]:
    import bench_training_gpu as shape

    from mansard.models.families import family_of

    depth = shape.SHAPE["num_hidden_layers"] + shape.NEW_BLOCKS
    config, family = shape.SHAPE | {"num_hidden_layers": depth}, family_of(shape.SHAPE)
    new = [family.block_tensor(b, n) for b in shape.new_indices() for n in family.block_tensors(config, b)]
    batches = shape.batches(1, TIMED_STEPS)
    train = section(case, "bf16", 1, shape.TOKENS)
    return measured(shape.make_model(depth), names_in(config, new), train, batches, shape.DEVICE)


def main() -> int:
    if len(sys.argv) == 2:
        figures = (on_gpu if torch.cuda.is_available() else on_cpu)(sys.argv[1])
        print(json.dumps({name: round(value, 4) for name, value in figures.items()}))
        return 0
    found = {}
    for case in CASES:
        done = subprocess.run([sys.executable, __file__, case], stdout=subprocess.PIPE, text=True, check=True)
        found[case] = json.loads(done.stdout.splitlines()[-1])
        print(case, found[case], flush=True)
    if not torch.cuda.is_available():
        from adapters_learning import learned

        with tempfile.TemporaryDirectory() as folder:
            for case, figures in learned(Path(folder), {case: adapter_of(case) for case in CASES}).items():
                found[case] |= {name: round(value, 4) for name, value in figures.items()}
                print(case, found[case], flush=True)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
