"""The training engine beside Hugging Face's Trainer on a CPU: the demo's shape, tokens and rows, one thread each.

Both train the four inserted blocks of the same expansion in float32 on the same packed rows with AdamW, warm-up,
cosine and clipping; Trainer logs and saves nothing. They take turns, so that a noisy machine is noisy for both.
Trainer is given the rows' positions, from which transformers keeps documents apart, as ours does;
`ratio_to_leaking_trainer` is against one that lets documents see each other. `bf16_ratio_to_trainer` is of both in
bf16: ours holds the model in it, with float32 masters, Trainer has its switch `bf16`. `ratio_to_swift` is against
Trainer on what ms-swift's `llamapro` tuner makes of the base (swift_tuner.py). Then ours with the demo's checkpoints.
The last line is JSON: ratio_to_trainer, checkpoint_time_fraction (of the loop's seconds, those in which it waited for
checkpoints), forecast_error (the preflight's memory over the peak, of the whole process, libraries included),
tokens_per_second.

Not reached: 1.3 times Trainer in float32. A step of 1,024 tokens is 9.4 GFLOP in linears and head, 2.1 in attention's
lower triangle (blocks of 64), in both loops; at the 110 GFLOP/s that oneDNN reaches on one core that is 105 ms, and
Trainer's step took 193 ms of CPU time at best (2026-11-26): with everything else free, 1.8 times. Ours took 165. Parts
measured alone, times how often they come: linears and head 90 ms (17 of them the new blocks' weight gradients),
attention 31, elementwise 13, optimizer 2; the rest is cold caches and calls. Left out, because they gave nothing:
weights packed ahead for oneDNN, smaller chunks of the head's loss, micro-batches of two rows and of one (2 and 17 %
slower), blocks of 128 queries (3 % slower), allocator settings (a step faults no page). Keeping the states below the
lowest new block from epoch to epoch would save 1 %: 28 % of the rows come twice.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from demo_shape import BATCH_SEQUENCES, NEW_BLOCKS, SEQUENCE_TOKENS, Upgrade, make_upgrade, train_section
from swift_tuner import has_swift, prepared

from mansard.models.freeze import freeze_except
from mansard.models.loading import load_model
from mansard.training.blocks import train_only
from mansard.training.engines import CPU_THREADS, LocalEngine
from mansard.training.loop import Moment, Plan, run_loop
from mansard.training.memory import peak_bytes
from mansard.training.preflight import preflight
from mansard.training.state import Checkpoints

STEPS = 40
WARM_STEPS = 5
TURNS = 4
CHECKPOINTED_STEPS = 160
CHECKPOINT_EVERY = 50
TOKENS_PER_STEP = BATCH_SEQUENCES * SEQUENCE_TOKENS


class TimedCheckpoints(Checkpoints):
    """Counts the seconds in which the loop waits for it."""

    waited_seconds = 0.0

    def write(self, *arguments: Any) -> None:
        began = time.perf_counter()
        super().write(*arguments)
        self.waited_seconds += time.perf_counter() - began

    def wait(self) -> None:
        began = time.perf_counter()
        super().wait()
        self.waited_seconds += time.perf_counter() - began


def engine_of(upgrade: Upgrade, dtype: torch.dtype = torch.float32) -> LocalEngine:
    model = upgrade.model(dtype)
    groups, _ = train_only(model, upgrade.names, train_section(STEPS).learning_rates)
    return LocalEngine(model, groups, 0.0, 1.0)


def ours(
    upgrade: Upgrade, work: Path, steps: int, checkpoint_every: int, dtype: torch.dtype = torch.float32
) -> tuple[float, float]:
    """(tokens a second, share of the time that checkpoints took)."""
    section = train_section(steps, evaluate_every_steps=steps + 1, checkpoint_every_steps=checkpoint_every)
    plan, times = Plan.of(section, SEQUENCE_TOKENS), [0.0]

    def report(moment: Moment) -> None:
        times.append(time.perf_counter())

    checkpoints = TimedCheckpoints(work)
    run_loop(engine_of(upgrade, dtype), upgrade.mixture, [], plan, checkpoints, report)
    checkpoints.path.unlink(missing_ok=True)
    seconds = times[steps - 1] - times[WARM_STEPS]  # the last step evaluates
    return (steps - 1 - WARM_STEPS) * TOKENS_PER_STEP / seconds, checkpoints.waited_seconds / (times[-1] - times[1])


def trainer(upgrade: Upgrade, work: Path, keeps_apart: bool, bf16: bool = False, with_swift: bool = False) -> float:
    """Tokens a second of Hugging Face's Trainer; `with_swift` on ms-swift's expansion of the base."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    times = [0.0]

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            times.append(time.perf_counter())

    if with_swift:
        model = prepared(load_model(upgrade.base, torch.float32), NEW_BLOCKS)
    else:
        model = upgrade.model()
        freeze_except(model, set(upgrade.names.parameters(upgrade.names.new)))
    rows = []
    for step in range(STEPS):
        batch = upgrade.mixture.batch(step)
        for tokens_T, positions_T in zip(batch.tokens_BT, batch.positions_BT, strict=True):
            labels_T = tokens_T.masked_fill(positions_T == 0, -100)  # transformers shifts them itself
            row = {"input_ids": tokens_T, "labels": labels_T}
            rows.append(row | ({"position_ids": positions_T} if keeps_apart else {}))
    arguments = TrainingArguments(
        output_dir=str(work), per_device_train_batch_size=BATCH_SEQUENCES, max_steps=STEPS, learning_rate=2e-3,
        lr_scheduler_type="cosine", warmup_steps=2, max_grad_norm=1.0, weight_decay=0.0, adam_beta2=0.95, use_cpu=True,
        bf16=bf16,
        logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Clock()]).train()
    return (STEPS - WARM_STEPS) * TOKENS_PER_STEP / (times[STEPS] - times[WARM_STEPS])


def main() -> int:
    torch.set_num_threads(CPU_THREADS)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        upgrade = make_upgrade(work)
        forecast = preflight(engine_of(upgrade), upgrade.mixture.batch(0), train_section(STEPS))
        _, fraction = ours(upgrade, work, CHECKPOINTED_STEPS, CHECKPOINT_EVERY)
        peak = peak_bytes(torch.device("cpu"))
        cases: dict[str, Callable[[], float]] = {
            "ours": lambda: ours(upgrade, work, STEPS, STEPS + 1)[0],
            "trainer": lambda: trainer(upgrade, work, keeps_apart=True),
            "leaking_trainer": lambda: trainer(upgrade, work, keeps_apart=False),
            "ours_bf16": lambda: ours(upgrade, work, STEPS, STEPS + 1, torch.bfloat16)[0],
            "trainer_bf16": lambda: trainer(upgrade, work, keeps_apart=True, bf16=True),
        }
        if has_swift():
            cases["swift"] = lambda: trainer(upgrade, work, keeps_apart=True, with_swift=True)
        speeds = [{name: case() for name, case in cases.items()} for _ in range(TURNS)]
    figures = {
        "ratio_to_trainer": median(turn["ours"] / turn["trainer"] for turn in speeds),
        "ratio_to_leaking_trainer": median(turn["ours"] / turn["leaking_trainer"] for turn in speeds),
        "bf16_ratio_to_trainer": median(turn["ours_bf16"] / turn["trainer_bf16"] for turn in speeds),
        **({"ratio_to_swift": median(turn["ours"] / turn["swift"] for turn in speeds)} if "swift" in cases else {}),
        "checkpoint_time_fraction": fraction,
        "forecast_error": forecast.peak_bytes / peak - 1,
        "tokens_per_second": median(turn["ours"] for turn in speeds),
        "trainer_tokens_per_second": median(turn["trainer"] for turn in speeds),
        "threads": CPU_THREADS,
    }
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
