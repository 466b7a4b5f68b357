"""The carry-on's training node on one GPU: memory with its account, speed against its limit, epochs from cache.

A branch of 100 M parameters beside the 32B shape (D 5,120, vocabulary 152,064), 8,192 tokens a step, states and head
random; then the 7B shape (D 4,096, vocabulary 32,000): a first epoch computes the base's states (a random Llama of 32
layers, forward only, by transformers) and trains on them, later ones read them from the cache in the store. Prints one
JSON line last (`--no-epochs` leaves the second part out, `--profile` lists kernels and says how much of a step's wall
time they take). Needs a CUDA device, torchao, and, for the epochs, transformers.
The base's forward is transformers', not vLLM's.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy
import torch

from mansard.canonical import canonical_json
from mansard.carry_on.account import account, use_gpu_settings
from mansard.carry_on.branch import Branch
from mansard.carry_on.cached import CAPTURE_FILE, open_cache
from mansard.carry_on.flat import FlatWeights
from mansard.carry_on.head import Head
from mansard.carry_on.loader import MICRO_TOKENS, Loader, Part, read_parts
from mansard.carry_on.node_engine import BranchEngine
from mansard.carry_on.sequences import distinct
from mansard.carry_on.shards import plan_shards, write_shard
from mansard.carry_on.wire import Coded, encode
from mansard.composition.shape import shape_of_size
from mansard.store.store import Store
from mansard.training.data import Batch, Mixture, Packed
from mansard.training.optimizer import Group, MasterAdamW

PARAMETERS = 100_000_000
STEP_ROWS, ROW_TOKENS = 8, 1024
LIMIT_BYTES = 1_000_000_000
DEVICE = torch.device("cuda", 0)


class Random:
    """A step's states, random, as a cache would give them."""

    def __init__(self, width: int) -> None:
        self.states_ND = torch.randn(STEP_ROWS * ROW_TOKENS, width, dtype=torch.float32).to(torch.bfloat16)
        self.taken = 0
        self.read: list[Part] = []

    def parts(self, batch: Batch) -> list[Part]:
        """Read once: what reading costs is measured with the epochs."""
        self.read = self.read or read_parts(self, batch, MICRO_TOKENS, is_pinned=True)
        return self.read

    def of(self, batch: Batch) -> tuple[Coded, list[int]]:
        count = batch.tokens_BT.numel()
        first = self.taken % len(self.states_ND)
        self.taken += count
        return Coded(self.states_ND[first : first + count]), []


def rates() -> tuple[float, float]:
    """(dense bf16 FLOP/s of an 8,192 cube, host-to-device bytes/s from pinned memory)."""
    a = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    seconds = timed(lambda: a @ a, 10)
    host = torch.empty(1 << 28, dtype=torch.uint8).pin_memory()
    there = torch.empty_like(host, device=DEVICE)
    link = timed(lambda: there.copy_(host, non_blocking=True), 5)
    torch._C._cuda_clearCublasWorkspaces()  # of a stream that the node does not use
    return 2 * 8192**3 / seconds, host.numel() / link


def timed(call: Any, count: int) -> float:
    """Seconds of one call, mean of `count` after two."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(count):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - begun) / count


def batch_of(vocabulary: int) -> Batch:
    tokens_BT = torch.randint(0, vocabulary, (STEP_ROWS, ROW_TOKENS))
    labels_BT = torch.full_like(tokens_BT, -100)
    labels_BT[:, :-1] = tokens_BT[:, 1:]
    return Batch(tokens_BT, torch.arange(ROW_TOKENS).repeat(STEP_ROWS, 1), labels_BT)


def engine_of(width: int, vocabulary: int, states: Any) -> tuple[BranchEngine, Any]:
    """100 M parameters in bf16, rounded stochastically, moments in 8 bits."""
    shape = shape_of_size(width, PARAMETERS)
    branch = Branch(shape)
    branch.start(0)
    rows_VD = (torch.randn(4096, width) * width**-0.5).to(torch.bfloat16).repeat(-(-vocabulary // 4096), 1)[:vocabulary]
    head = Head(rows_VD.contiguous(), DEVICE, torch.bfloat16)
    weights = FlatWeights(branch, DEVICE, torch.bfloat16)
    groups = [Group("branch", 1e-4, weights.parameters)]
    optimizer = MasterAdamW(groups, 0.0, "adamw_8bit", "stochastic_rounding")
    return BranchEngine(weights, head, states, optimizer, 1.0, 1.0), shape


def memory_and_speed(width: int, vocabulary: int, steps: int) -> dict[str, Any]:
    """Peak reserved bytes, the account beside it, tokens/s and where a step's time goes."""
    dense, link = rates()
    torch.cuda.empty_cache()
    free_before, _ = torch.cuda.mem_get_info()
    torch.cuda.reset_peak_memory_stats()
    engine, shape = engine_of(width, vocabulary, Random(width))
    batch = batch_of(vocabulary)
    peaks = {"start": torch.cuda.memory_allocated()}
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        loss = engine.gradients(batch)
        peaks["gradients"] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        engine.step(1.0)
        peaks["step"] = torch.cuda.max_memory_allocated()
    if "--profile" in sys.argv:
        profile(engine, batch)
    spent = {"gradients": 0.0, "step": 0.0}
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(steps):
        before = time.perf_counter()
        loss = engine.gradients(batch)
        torch.cuda.synchronize()
        middle = time.perf_counter()
        engine.step(1.0)
        torch.cuda.synchronize()
        spent["gradients"] += middle - before
        spent["step"] += time.perf_counter() - middle
    seconds = (time.perf_counter() - begun) / steps
    tokens = STEP_ROWS * ROW_TOKENS
    found = account(shape, vocabulary, tokens, MICRO_TOKENS, 2, engine.optimizer_bytes, on_gpu=True)
    reserved = torch.cuda.max_memory_reserved()
    free_after, _ = torch.cuda.mem_get_info()
    flops = 6 * shape.parameters + 4 * width * vocabulary
    limit = min(dense / flops, tokens / (vocabulary * width * 2 / link))
    print("\n".join(found.lines()))
    return {
        "parameters": shape.parameters,
        "reserved_bytes": reserved,
        "allocated_bytes": max(peaks.values()),
        "peaks": peaks,
        "account_bytes": found.peak,
        "account_ratio": round(reserved / found.peak, 4),
        "context_bytes": free_before - free_after - reserved,
        "tokens_per_second": round(tokens / seconds),
        "limit_tokens_per_second": round(limit),
        "share_of_limit": round(tokens / seconds / limit, 3),
        "dense_tflops": round(dense / 1e12),
        "link_gb_per_second": round(link / 1e9, 1),
        "step_ms": {k: round(1000 * v / steps, 1) for k, v in spent.items()},
        "loss": round(loss.mean, 3),
    }


def profile(engine: BranchEngine, batch: Batch) -> None:
    """Where gradients and step spend their time on the device, kernel by kernel, beside the wall time."""
    for name, act in {"gradients": lambda: engine.gradients(batch), "step": lambda: engine.step(1.0)}.items():
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            begun = time.perf_counter()
            act()
            torch.cuda.synchronize()
            wall = time.perf_counter() - begun
        kernels = sum(event.self_device_time_total for event in seen.key_averages()) / 1e6
        print(f"{name}: {1000 * wall:.1f} ms, of which kernels and copies {1000 * kernels:.1f} ms (both streams)")
        print(seen.key_averages().table(sort_by="self_cuda_time_total", row_limit=14, max_name_column_width=60))


def epochs(scheme: Any, rows: int) -> dict[str, Any]:
    """First epoch (states by the base, then a step) against later ones (states from the store), 7B shape."""
    from transformers import LlamaConfig, LlamaModel

    width, vocabulary = 4096, 32_000
    config = LlamaConfig(
        hidden_size=width, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32,
        vocab_size=vocabulary, max_position_embeddings=4096, attn_implementation="sdpa",
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with DEVICE:
        base = LlamaModel(config).eval()
    torch.set_default_dtype(torch.float32)
    tokens_RT = numpy.random.default_rng(0).integers(0, vocabulary, (rows, ROW_TOKENS), dtype=numpy.int32)
    packed = Packed("text", tokens_RT, numpy.tile(numpy.arange(ROW_TOKENS, dtype=numpy.int32), (rows, 1)), 4.0)
    states: list[torch.Tensor] = []
    with torch.no_grad():
        first = torch.from_numpy(tokens_RT[:STEP_ROWS]).long().to(DEVICE)
        base(first, use_cache=False)
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for row in range(0, rows, STEP_ROWS):
            tokens_BT = torch.from_numpy(tokens_RT[row : row + STEP_ROWS]).long().to(DEVICE)
            found = base(tokens_BT, use_cache=False).last_hidden_state
            states += list(found.to("cpu", torch.bfloat16))
        torch.cuda.synchronize()
        capture_seconds = time.perf_counter() - begun
    del base, found
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as work:
        begun = time.perf_counter()
        cache = _cached(Path(work), packed, states, scheme, width)
        write_seconds = time.perf_counter() - begun
        loader = Loader(cache, Mixture([packed], [1.0], STEP_ROWS, 0), MICRO_TOKENS, is_pinned=True)
        engine, _ = engine_of(width, vocabulary, loader)
        steps = rows // STEP_ROWS
        seconds = []
        for epoch in range(3):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            for step in range(steps):
                engine.gradients(loader.batch(epoch * steps + step))
                engine.step(1.0)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
        loader.close()
    tokens = rows * ROW_TOKENS
    later = min(seconds[1:])
    return {
        "capture_tokens_per_second": round(tokens / capture_seconds),
        "cached_tokens_per_second": round(tokens / later),
        "store_seconds": round(write_seconds, 2),
        "epoch_seconds": [round(s, 2) for s in seconds],
        "later_epoch_ratio": round((capture_seconds + later) / later, 2),
        "scheme": scheme,
    }


def _cached(work: Path, packed: Packed, states: list[torch.Tensor], scheme: Any, width: int) -> Any:
    """The states in a store, opened as training opens them."""
    folder = work / "cache"
    folder.mkdir()
    wanted = distinct([packed])
    assert len(wanted) == len(states), "a row is a sequence"
    taken = iter(states)
    for shard in plan_shards(wanted):
        write_shard(folder, shard, [encode(next(taken), [0], scheme) for _ in shard.sequences], scheme)
    (folder / CAPTURE_FILE).write_bytes(canonical_json({"format": 1, "width": width, "sources": {}}))
    store = Store(work / "store")
    return open_cache(store, store.snapshot(folder))


def main() -> int:
    use_gpu_settings()
    if not torch.cuda.is_available():
        print("bench-training-node: a CUDA device is needed", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    node = memory_and_speed(5120, 152_064, 20)
    print(json.dumps(node))
    torch.cuda.empty_cache()
    later = epochs("fp8", 128) if "--no-epochs" not in sys.argv else {}
    print(json.dumps({"device": torch.cuda.get_device_name(), "node_32b": node, "epochs_7b": later}))
    is_small = node["reserved_bytes"] < LIMIT_BYTES
    return 0 if is_small else 1


if __name__ == "__main__":
    sys.exit(main())
