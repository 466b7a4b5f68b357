"""The training engine beside Hugging Face's Trainer on a CPU: the demo's shape, tokens and rows, one thread each.

Both train the four inserted blocks of the same expansion on the same packed rows with AdamW, warm-up, cosine and
clipping; Trainer logs and saves nothing. They take turns, so that a noisy machine is noisy for both. Ours trains as the
demo does: a model in float32, the blocks' products in bf16 (`frozen: bf16`, `new_blocks: bf16`). `ratio_to_trainer` is
against the faster of Trainer in float32 and Trainer with its switch `bf16`, turn by turn (the harder of two readings of
the goal, 1.3, and not reached), `ratio_to_default_trainer` against Trainer in float32, its default,
`fp32_ratio_to_trainer` of both in float32, `bf16_ratio_to_trainer` of both in bf16 (ours holds the whole model in it
then, with float32 masters). Trainer is given the rows' positions, from which transformers keeps documents apart, as
ours does; `ratio_to_leaking_trainer` is against one that lets documents see each other, `ratio_to_swift` against one on
what ms- swift's `llamapro` tuner makes of the base (swift_tuner.py), both in float32. `loss_ratio` is what the
products' type costs: the last steps' mean loss over that of training in float32. Then ours with the demo's checkpoints.
The last line is JSON, with checkpoint_time_fraction (of the loop's seconds, those in which it waited for checkpoints)
and forecast_error (the preflight's memory over the peak, of the whole process, libraries included).

Where a step's time goes (1,024 tokens, one core of a Zen 4, 2026-11-26): 9.4 GFLOP in linears and head, 2.1 in
attention's lower triangle (blocks of 64), in both loops. In float32, at oneDNN's 110 GFLOP/s, that is 105 ms; Trainer
took 193 ms of CPU time at best, ours 165: linears and head 90 ms (17 of them the new blocks' weight gradients),
attention 31, elementwise 13, optimizer 2, the rest cold caches and calls. In bf16 products run at 215 GFLOP/s: ours
took 116 ms where it took 167 in float32 in the same run; 124 while attention's own were in float32 (2026-11-27), 154
with the frozen linears' alone in bf16. The head's in bf16 gave nothing (its logits must come back). Left out in
float32, because they gave nothing: weights packed ahead for oneDNN, smaller chunks of the head's loss, micro-batches of
two rows and of one (2 and 17 % slower), blocks of 128 queries (3 % slower), allocator settings (a step faults no page).
Keeping the states below the lowest new block from epoch to epoch would save 1 %: 28 % of the rows come twice.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
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
CHECKPOINTED_STEPS, LAST_STEPS = 300, 40
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


def engine_of(upgrade: Upgrade, products: str | None = "bf16", dtype: torch.dtype = torch.float32) -> LocalEngine:
    model = upgrade.model(dtype)
    groups, _ = train_only(model, upgrade.names, train_section(STEPS).learning_rates, products, products)
    return LocalEngine(model, groups, 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens a second, share of the time that checkpoints took, mean loss of the last steps in nats."""

    speed: float
    waited: float
    loss: float


def ours(upgrade: Upgrade, engine: LocalEngine, work: Path, steps: int, checkpoint_every: int) -> Run:
    section = train_section(steps, evaluate_every_steps=steps + 1, checkpoint_every_steps=checkpoint_every)
    plan, times, losses = Plan.of(section, SEQUENCE_TOKENS), [0.0], []

    def report(moment: Moment) -> None:
        times.append(time.perf_counter())
        losses.append(moment.loss)

    checkpoints = TimedCheckpoints(work)
    run_loop(engine, upgrade.mixture, [], plan, checkpoints, report)
    checkpoints.path.unlink(missing_ok=True)
    seconds = times[steps - 1] - times[WARM_STEPS]  # the last step evaluates
    speed = (steps - 1 - WARM_STEPS) * TOKENS_PER_STEP / seconds
    return Run(speed, checkpoints.waited_seconds / (times[-1] - times[1]), mean(losses[-LAST_STEPS:]))


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
        whole = ours(upgrade, engine_of(upgrade), work, CHECKPOINTED_STEPS, CHECKPOINT_EVERY)
        peak = peak_bytes(torch.device("cpu"))
        exact = ours(upgrade, engine_of(upgrade, None), work, CHECKPOINTED_STEPS, CHECKPOINT_EVERY)

        def speed(products: str | None, dtype: torch.dtype = torch.float32) -> float:
            return ours(upgrade, engine_of(upgrade, products, dtype), work, STEPS, STEPS + 1).speed

        cases: dict[str, Callable[[], float]] = {
            "ours": lambda: speed("bf16"),
            "ours_fp32": lambda: speed(None),
            "trainer": lambda: trainer(upgrade, work, keeps_apart=True),
            "leaking_trainer": lambda: trainer(upgrade, work, keeps_apart=False),
            "ours_bf16": lambda: speed(None, torch.bfloat16),
            "trainer_bf16": lambda: trainer(upgrade, work, keeps_apart=True, bf16=True),
        }
        if has_swift():
            cases["swift"] = lambda: trainer(upgrade, work, keeps_apart=True, with_swift=True)
        speeds = [{name: case() for name, case in cases.items()} for _ in range(TURNS)]
    figures = {
        "ratio_to_trainer": median(turn["ours"] / max(turn["trainer"], turn["trainer_bf16"]) for turn in speeds),
        "ratio_to_default_trainer": median(turn["ours"] / turn["trainer"] for turn in speeds),
        "fp32_ratio_to_trainer": median(turn["ours_fp32"] / turn["trainer"] for turn in speeds),
        "ratio_to_leaking_trainer": median(turn["ours_fp32"] / turn["leaking_trainer"] for turn in speeds),
        "bf16_ratio_to_trainer": median(turn["ours_bf16"] / turn["trainer_bf16"] for turn in speeds),
        **{f"ratio_to_{n}": median(turn["ours_fp32"] / turn[n] for turn in speeds) for n in cases if n == "swift"},
        "loss_ratio": whole.loss / exact.loss,
        "checkpoint_time_fraction": whole.waited,
        "forecast_error": forecast.peak_bytes / peak - 1,
        "tokens_per_second": median(turn["ours"] for turn in speeds),
        "trainer_tokens_per_second": median(turn["trainer"] for turn in speeds),
        "trainer_bf16_tokens_per_second": median(turn["trainer_bf16"] for turn in speeds),
        "threads": CPU_THREADS,
    }
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
