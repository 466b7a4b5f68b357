"""Before the first step: what training will take and how fast it will be, measured on one block of each kind.

One forward and backward pass of a block of each kind (below the lowest trained block, frozen, trained) on a real
micro-batch says what it keeps, what passes through memory and how long it takes; sums over the depth are the forecast.
The fewest blocks are recomputed in backward that let the peak fit the limit; where all of them do not suffice, the run
is refused with the numbers. Gradients are dropped and no random number is drawn, so the training is the same without.
"""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mansard.errors import BadInput
from mansard.specs.training import Train
from mansard.training.attention import preferred_kernels
from mansard.training.data import Batch
from mansard.training.engines import LocalEngine
from mansard.training.memory import Kept, available_bytes, peak_bytes, taken_bytes

ROUNDS = 3
"""Passes of one block; the last is measured (the first compiles)."""
GIB = 2**30


@dataclass(frozen=True, slots=True)
class BlockCost:
    """Of one pass: what it keeps for backward beside its output, what comes and goes while backward runs."""

    has_graph: bool
    kept_bytes: int
    passing_bytes: int
    gradient_bytes: int
    forward_seconds: float
    backward_seconds: float


@dataclass(frozen=True, slots=True)
class Costs:
    """Of one micro-batch: block by block, the head, and what stays: weights, masters, moments."""

    blocks: tuple[BlockCost, ...]
    states_bytes: int
    head_bytes: int
    head_seconds: float
    lasting_bytes: int
    step_bytes: int
    step_seconds: float
    micro_batches: int
    highest_so_far: int
    anchor_seconds: float = 0.0
    anchor_bytes: int = 0

    @property
    def gradient_bytes(self) -> int:
        return sum(block.gradient_bytes for block in self.blocks)

    def peak(self, recomputed: Sequence[bool]) -> int:
        """Bytes at the worst moment: after the head, in some block's backward, or in the optimizer's step."""
        held = 0
        for block, again in zip(self.blocks, recomputed, strict=True):
            held += block.has_graph * (self.states_bytes + (0 if again else block.kept_bytes))
        held += self.anchor_bytes
        gradients = self.gradient_bytes if self.micro_batches > 1 else 0
        peak = max(self.highest_so_far, self.lasting_bytes + held + gradients + self.head_bytes)
        for block, again in zip(reversed(self.blocks), reversed(recomputed), strict=True):
            if block.has_graph:
                passing = block.passing_bytes + (block.kept_bytes + self.states_bytes if again else 0)
                peak = max(peak, self.lasting_bytes + held + gradients + self.states_bytes + passing)
                held -= self.states_bytes + (0 if again else block.kept_bytes)
                gradients += block.gradient_bytes if self.micro_batches == 1 else 0
        return max(peak, self.lasting_bytes + self.gradient_bytes + self.step_bytes)

    def seconds(self, recomputed: Sequence[bool]) -> float:
        """Of one step."""
        passes = sum(
            block.forward_seconds * (2 if again else 1) + block.backward_seconds
            for block, again in zip(self.blocks, recomputed, strict=True)
        )
        return self.micro_batches * (passes + self.head_seconds + self.anchor_seconds) + self.step_seconds


@dataclass(frozen=True, slots=True)
class Forecast:
    """The peak expected, with `recomputed` of `with_graph` blocks recomputed in backward."""

    peak_bytes: int
    limit_bytes: int
    tokens_per_second: float
    recomputed: int
    with_graph: int

    def text(self) -> str:
        kept = "all activations are kept"
        if self.recomputed:
            kept = f"{self.recomputed} of {self.with_graph} blocks are recomputed in backward"
        return (
            f"expected memory {self.peak_bytes / GIB:.2f} GiB of {self.limit_bytes / GIB:.2f}, "
            f"about {self.tokens_per_second:,.0f} tokens/s; {kept}"
        )


def preflight(engine: LocalEngine, batch: Batch, train: Train) -> Forecast:
    """Compile (on an accelerator), measure, and let the engine recompute as many blocks as the limit asks.

    BadInput with the numbers where no choice fits.
    """
    try:
        costs = measure(engine, batch)
    except torch.OutOfMemoryError as error:
        raise BadInput(
            f"not even one block of a micro-batch fits in {available_bytes(engine.device) / GIB:.2f} GiB; "
            "lower train.micro_batch_sequences or data.sequence_tokens"
        ) from error
    limit = available_bytes(engine.device)
    if train.memory_gib is not None:
        limit = min(limit, int(train.memory_gib * GIB))
    with_graph = sum(block.has_graph for block in costs.blocks)
    for count in range(with_graph + 1):
        recomputed = engine.objective.decoder.recompute(count)
        peak = costs.peak(recomputed)
        if peak <= limit:
            rate = batch.tokens_BT.numel() / costs.seconds(recomputed)
            return Forecast(peak, limit, rate, count, with_graph)
    raise BadInput(
        f"training would take {peak / GIB:.2f} GiB with every block recomputed (weights, masters and moments "
        f"{costs.lasting_bytes / GIB:.2f}, gradients {costs.gradient_bytes / GIB:.2f}), and there are "
        f"{limit / GIB:.2f} GiB; lower train.micro_batch_sequences or data.sequence_tokens, take optimizer: adamw_8bit "
        "or master: stochastic_rounding, or raise train.memory_gib"
    )


def measure(engine: LocalEngine, batch: Batch) -> Costs:
    """Costs of `batch`'s first micro-batch; the blocks are compiled where the engine compiles."""
    parts = batch.parts(engine.micro_batch_sequences)
    states_BTH, arguments = engine.objective.decoder.arguments(lambda: engine.objective.hidden(parts[0]))
    engine.objective.decoder.compile()
    engine.module.train()
    with preferred_kernels(engine.device):
        blocks = _block_costs(engine, states_BTH, arguments)
        head_bytes, head_seconds = _head_cost(engine, states_BTH, parts[0])
    engine.module.zero_grad()
    step = engine.optimizer_bytes()
    return Costs(
        blocks,
        states_BTH.nbytes,
        head_bytes,
        head_seconds,
        taken_bytes(engine.device) - states_BTH.nbytes + step.moments,
        step.passing,
        step.moved / _bytes_per_second(states_BTH),
        len(parts),
        peak_bytes(engine.device) if engine.device.type == "cpu" else 0,
        *_anchor_cost(engine, batch, blocks, states_BTH, head_seconds),
    )


def _anchor_cost(
    engine: LocalEngine, batch: Batch, blocks: Sequence[BlockCost], states_BTH: torch.Tensor, head_seconds: float
) -> tuple[float, int]:
    """(seconds, bytes) a micro-batch of the base's pass over the general rows and of comparing with it: the base's last
    states, the model's of the same rows, and their gradient."""
    anchor = engine.objective.anchor
    if anchor is None:
        return 0.0, 0
    share = len(batch.general_rows) / len(batch.tokens_BT)
    forward = sum(cost.forward_seconds for i, cost in enumerate(blocks) if i not in anchor.new_blocks)
    return share * (forward + head_seconds), int(3 * share * states_BTH.nbytes)


def _block_costs(engine: LocalEngine, states_BTH: torch.Tensor, arguments: Mapping[str, Any]) -> tuple[BlockCost, ...]:
    measured: dict[Hashable, BlockCost] = {}
    costs = []
    for index, block in enumerate(engine.objective.decoder.blocks):
        kind = engine.objective.decoder.kind(index)
        if kind not in measured:
            measured[kind] = _block_cost(engine, index, block, states_BTH, arguments)
            engine.module.zero_grad()
        costs.append(measured[kind])
    return tuple(costs)


def _block_cost(
    engine: LocalEngine,
    index: int,
    block: Any,  # noqa: ANN401 - a module of transformers
    states_BTH: torch.Tensor,
    arguments: Mapping[str, Any],
) -> BlockCost:
    lowest = engine.objective.decoder.lowest_trained
    has_graph = index >= lowest
    downstream = torch.ones_like(states_BTH)
    output_BTH: torch.Tensor | None = None
    for _ in range(ROUNDS):
        output_BTH = None  # and with it the graph of the round before, before anything is counted
        engine.module.zero_grad()
        input_BTH = states_BTH.detach().requires_grad_(index > lowest)
        keeping = Kept(engine.device, [input_BTH, *block.parameters(), *block.buffers(), *_tensors(arguments)])
        with keeping:
            output_BTH, forward_seconds = _timed(engine.device, partial(block, input_BTH, **arguments))
        kept = keeping.size_bytes - (output_BTH.nbytes if engine.device.type == "cuda" else 0)
        passing, backward_seconds = 0, 0.0
        if has_graph:
            before = _start_of_peak(engine.device)
            _, backward_seconds = _timed(engine.device, partial(output_BTH.backward, downstream))
            # A CPU's allocator tells no peak; backward passes about what forward kept.
            passing = peak_bytes(engine.device) - before if before else kept
    gradients = sum(p.nbytes for p in block.parameters() if p.requires_grad)
    return BlockCost(has_graph, kept if has_graph else 0, passing, gradients, forward_seconds, backward_seconds)


def _tensors(arguments: Mapping[str, Any]) -> list[torch.Tensor]:
    values = [v for value in arguments.values() for v in (value if isinstance(value, tuple) else (value,))]
    return [value for value in values if isinstance(value, torch.Tensor)]


def _head_cost(engine: LocalEngine, states_BTH: torch.Tensor, part: Batch) -> tuple[int, float]:
    """(bytes at most in hand, seconds) of the head's loss, forward and backward."""
    for _ in range(ROUNDS):
        hidden_BTH = states_BTH.detach().requires_grad_()
        before = _start_of_peak(engine.device)
        _, seconds = _timed(engine.device, partial(_head_pass, engine, hidden_BTH, part))
    held = engine.objective.head_loss.held_bytes(part.tokens_BT.numel())
    passed = peak_bytes(engine.device) - before if before else held
    return passed, seconds


def _head_pass(engine: LocalEngine, hidden_BTH: torch.Tensor, part: Batch) -> None:
    engine.objective.nats(hidden_BTH, part.labels_BT).backward()


def _start_of_peak(device: torch.device) -> int:
    """Bytes taken now, and the peak counts from here; 0 on a CPU, which cannot tell."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return taken_bytes(device)


def _timed(device: torch.device, act: Callable[[], Any]) -> tuple[Any, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    value = act()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return value, time.perf_counter() - began


def _bytes_per_second(like: torch.Tensor) -> float:
    """What a copy reads and writes a second."""
    source = like.detach().clone()
    for _ in range(ROUNDS):
        _, seconds = _timed(like.device, source.clone)
    copied: int = 2 * source.nbytes
    return copied / max(seconds, 1e-9)
