"""The training engine on one GPU beside what peers run: speed, memory, and whether FP8 learns the same.

Llama-2-7B's shape with 8 even new blocks, sequence 4096, random weights, made on the device. "Trainer" is Hugging
Face's own Trainer on the same model with the same blocks training: with gradient checkpointing and input gradients
forced, as peers set it, and without; "swift" is the same loop on what ms-swift's `llamapro` tuner makes of the base
(swift_tuner.py; not among the cases where it is not installed). The limit is the dense bf16 rate of 8192^3 products on
random data over the FLOPs a token needs: causal attention counted as causal, no input gradient below the first new
block, no weight gradient of what is frozen. The learning part trains a small base on this Python's own library,
expands it, and trains the same storey in bf16 and in FP8. `--cases` picks cases; the last line is JSON.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from swift_tuner import has_swift, prepared
from transformers import LlamaConfig, LlamaForCausalLM

from mansard.models.expand import plan
from mansard.models.freeze import freeze_except
from mansard.specs.surgery import Expand
from mansard.specs.training import LearningRates, Train
from mansard.training.data import Batch, as_batch
from mansard.training.engines import LocalEngine
from mansard.training.optimizer import Group
from mansard.training.preflight import preflight
from mansard.training.quantized_blocks import quantize_linears

SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32, "num_key_value_heads": 32, "num_hidden_layers": 32, "max_position_embeddings": 4096,
    "head_dim": 128, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
NEW_BLOCKS = 8
TOKENS = 4096
WARM_STEPS, TIMED_STEPS = 1, 3
MICRO_BATCHES = 4
"""A step takes so many micro-batches of four rows, in ours and in the Trainer."""
DEVICE = torch.device("cuda", 0)


def make_model(blocks: int) -> Any:
    """Random weights in bf16, on the device."""
    torch.manual_seed(0)
    config = LlamaConfig(**(SHAPE | {"num_hidden_layers": blocks, "attn_implementation": "sdpa"}))
    torch.set_default_dtype(torch.bfloat16)
    with DEVICE:
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model


def new_indices() -> list[int]:
    return [block.index for block in plan(SHAPE, Expand(blocks=NEW_BLOCKS)).new_blocks]


def trained_names(model: Any, indices: list[int]) -> set[str]:
    blocks = tuple(f"model.layers.{index}." for index in indices)
    return {name for name, _ in model.named_parameters() if name.startswith(blocks)}


def batches(rows: int, count: int) -> list[Batch]:
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(SHAPE["vocab_size"], (count, rows, TOKENS), generator=draw, dtype=torch.int32).numpy()
    positions = torch.arange(TOKENS, dtype=torch.int32).expand(rows, TOKENS).numpy()
    return [as_batch(t, positions) for t in tokens]


def flops_per_token() -> float:
    """Of one training step of the expansion, as the module docstring counts."""
    hidden, inner, depth = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["num_hidden_layers"] + NEW_BLOCKS
    block = 2 * (4 * hidden * hidden + 3 * hidden * inner)
    attention = 2 * TOKENS * hidden  # two products over half of the square
    head = 2 * SHAPE["vocab_size"] * hidden
    lowest = new_indices()[0]
    forward = depth * (block + attention) + head
    backward = (depth - lowest - 1) * block + (depth - lowest) * 2 * attention + head
    return forward + backward + NEW_BLOCKS * block


def dense_rate() -> float:
    """bf16 FLOP/s of an 8192^3 product on random data."""
    one, other = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(13):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(10):
            one @ other
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - began) / 10)
    return 2 * 8192**3 / sorted(seconds[3:])[5]


def ours(rows: int, micro: int, **section: Any) -> dict[str, Any]:
    train = Train(
        tokens=rows * TOKENS, batch_sequences=rows, learning_rates=LearningRates(new_blocks=1e-5),
        micro_batch_sequences=micro, **section,
    )  # fmt: skip
    model = make_model(SHAPE["num_hidden_layers"] + NEW_BLOCKS)
    names = trained_names(model, new_indices())
    freeze_except(model, names)
    if train.frozen == "fp8":
        quantize_linears(model.get_decoder().layers, train.new_blocks == "fp8")
    group = Group("new_blocks", 1e-5, {n: p for n, p in model.named_parameters() if n in names})
    engine = LocalEngine(model, [group], 0.0, 1.0, optimizer=train.optimizer, master=train.master,
                         micro_batch_sequences=micro)  # fmt: skip
    data = batches(rows, WARM_STEPS + TIMED_STEPS)
    began = time.perf_counter()
    forecast = preflight(engine, data[0], train)
    preflight_seconds = time.perf_counter() - began
    torch.cuda.reset_peak_memory_stats()
    losses = []
    for step, batch in enumerate(data):
        if step == WARM_STEPS:
            torch.cuda.synchronize()
            began = time.perf_counter()
        losses.append(engine.gradients(batch).mean)
        engine.step(1.0)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / TIMED_STEPS
    peak = torch.cuda.max_memory_allocated()
    return {
        "tokens_per_second": rows * TOKENS / seconds, "peak_gib": peak / 2**30, "recomputed": forecast.recomputed,
        "forecast_gib": forecast.peak_bytes / 2**30, "forecast_tokens_per_second": forecast.tokens_per_second,
        "forecast_error": forecast.peak_bytes / peak - 1, "preflight_seconds": preflight_seconds, "loss": losses[-1],
    }  # fmt: skip


def trainer(
    blocks: int,
    rows: int,
    checkpointing: bool,
    trains: list[int] | None,
    micro_batches: int = 1,
    with_swift: bool = False,
) -> dict[str, Any]:
    """Hugging Face's Trainer; `trains` None trains everything, or what ms-swift's tuner leaves to train."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        began = 0.0
        seconds = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            torch.cuda.synchronize()
            if state.global_step == WARM_STEPS:
                self.began = time.perf_counter()
            self.seconds = (time.perf_counter() - self.began) / max(state.global_step - WARM_STEPS, 1)

    model = make_model(blocks)
    if with_swift:
        model = prepared(model, NEW_BLOCKS)
    elif trains is not None:
        freeze_except(model, trained_names(model, trains))
    if checkpointing:
        model.enable_input_require_grads()
    data = [{"input_ids": row, "labels": row} for batch in batches(rows, 4) for row in batch.tokens_BT]
    arguments = TrainingArguments(
        output_dir="/tmp/trainer", per_device_train_batch_size=rows, max_steps=WARM_STEPS + TIMED_STEPS, bf16=True,
        gradient_accumulation_steps=micro_batches,
        gradient_checkpointing=checkpointing, learning_rate=1e-5, logging_strategy="no", save_strategy="no",
        report_to=[], disable_tqdm=True, num_train_epochs=99,
    )  # fmt: skip
    clock = Clock()
    torch.cuda.reset_peak_memory_stats()
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[clock]).train()
    return {
        "tokens_per_second": micro_batches * rows * TOKENS / clock.seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def learning() -> dict[str, Any]:
    import fp8_learning

    return fp8_learning.compare(DEVICE)


LEAN = {"frozen": "fp8", "new_blocks": "fp8", "optimizer": "adamw_8bit", "master": "stochastic_rounding"}
CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "trainer_checkpointing_4": lambda: trainer(40, 4, True, new_indices(), MICRO_BATCHES),
    "swift_4": lambda: trainer(32, 4, True, None, MICRO_BATCHES, with_swift=True),
    "trainer_1": lambda: trainer(40, 1, False, new_indices()),
    "full_tuning_1": lambda: trainer(32, 1, False, None),
    "bf16_4": lambda: ours(4 * MICRO_BATCHES, 4),
    "fp8_frozen_4": lambda: ours(4 * MICRO_BATCHES, 4, frozen="fp8"),
    "fp8_4": lambda: ours(4 * MICRO_BATCHES, 4, frozen="fp8", new_blocks="fp8"),
    "fp8_lean_1": lambda: ours(1, 1, memory_gib=MEMORY_GIB, **LEAN),
    "learning": learning,
}
MEMORY_GIB = 24.0
"""For the lean case: under 40 % of full fine-tuning's 62.7 GiB (2026-11)."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default=",".join(CASES))
    asked = parser.parse_args().cases.split(",")
    chosen = [name for name in asked if name != "swift_4" or has_swift()]
    rate = dense_rate()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "dense_tflops": rate / 1e12,
        "gflop_per_token": flops_per_token() / 1e9, "limit_tokens_per_second": rate / flops_per_token(),
    }  # fmt: skip
    for name in chosen:
        began = time.perf_counter()
        found[name] = CASES[name]() | {"case_seconds": time.perf_counter() - began}
        print(name, json.dumps(found[name]), file=sys.stderr, flush=True)
        gc.collect()
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    print(json.dumps(found | ratios(found)))
    return 0


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """The lines of the table whose cases have run."""

    def speed(case: str) -> float:
        return float(found[case]["tokens_per_second"])

    made: dict[str, Callable[[], float]] = {
        "ratio_to_trainer": lambda: speed("fp8_4") / speed("trainer_checkpointing_4"),
        "ratio_to_swift": lambda: speed("fp8_4") / speed("swift_4"),
        "ratio_to_limit": lambda: speed("fp8_4") / found["limit_tokens_per_second"],
        "memory_of_full_tuning": lambda: found["fp8_lean_1"]["peak_gib"] / found["full_tuning_1"]["peak_gib"],
        "lean_ratio_to_trainer": lambda: speed("fp8_lean_1") / speed("trainer_1"),
    }
    return {name: make() for name, make in made.items() if _known(make)}


def _known(make: Callable[[], float]) -> bool:
    try:
        make()
    except KeyError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
