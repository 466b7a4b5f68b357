"""The training node's memory, item by item, before the first step.

Phase 2 holds y and the float32 sums of p W, phase 3 the gradients (in the same memory) and a micro-batch's activations;
the optimizer's step comes after them. The largest of the three is the peak. Legend: P parameters, N tokens of a step, n
of a micro-batch, D base width, C rows of a chunk.
"""

import os
from dataclasses import dataclass

from mansard.carry_on.head import CHUNK_ROWS
from mansard.carry_on.streamed_loss import BLOCK_TOKENS
from mansard.composition.shape import BranchShape
from mansard.training.optimizer import HeldBytes

WORKSPACE_BYTES = 17_000_000
"""cuBLAS's on a GPU, of the thread that goes forward and the one that goes backward, as `GPU_SETTINGS` has it."""
UNFILLED_BYTES = 80_000_000
"""What the allocator reserves around all that: its pages of 20 MB in six places (87 MB measured, H100, 2026-11)."""
GPU_SETTINGS = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "CUBLAS_WORKSPACE_CONFIG": ":4096:2:16:8"}
"""With the libraries' own, cuBLAS takes four times as much on a Hopper, and large pieces do not share memory."""
OUTPUT_VALUES = 2
"""D-wide values a token that a micro-batch's backward holds: f and the mixer's product, then their gradients."""
TAP_VALUES = 2
"""The same for every state that is tapped: normed, weighted."""


@dataclass(frozen=True, slots=True)
class Account:
    """Bytes by item: (item, bytes) pairs of each part of a step."""

    phase_2: tuple[tuple[str, int], ...]
    phase_3: tuple[tuple[str, int], ...]
    optimizer: tuple[tuple[str, int], ...]

    @property
    def peak(self) -> int:
        return max(sum(n for _, n in items) for items in (self.phase_2, self.phase_3, self.optimizer))

    def lines(self) -> list[str]:
        """For people: every item of every part, megabytes."""
        made = []
        parts = {"phase 2, the head": self.phase_2, "phase 3, backward": self.phase_3, "the step": self.optimizer}
        for title, items in parts.items():
            made += [f"{title}:", *(f"  {name:38} {size / 1e6:8.1f} MB" for name, size in items)]
            made.append(f"  {'together':38} {sum(n for _, n in items) / 1e6:8.1f} MB")
        return made


def account(
    shape: BranchShape,
    vocabulary: int,
    step_tokens: int,
    micro_tokens: int,
    value_bytes: int,
    optimizer: HeldBytes,
    on_gpu: bool,
) -> Account:
    """`value_bytes` of a weight (2: bf16, 4: float32)."""
    parameters, width = shape.parameters, shape.base_width
    chunk, block = min(CHUNK_ROWS, vocabulary), min(BLOCK_TOKENS["cuda" if on_gpu else "cpu"], step_tokens)
    read = TAP_VALUES * (1 + len(shape.taps)) if shape.taps else 0
    lent = max(parameters * value_bytes, 4 * step_tokens * width)
    always = (
        ("branch's weights", parameters * value_bytes),
        *((("optimizer's masters", optimizer.masters),) if optimizer.masters else ()),
        ("optimizer's moments", optimizer.moments),
        ("gradients, before them the sums of p W", lent),
    )
    buffers = (
        ("two chunks of the head", 2 * chunk * width * value_bytes),
        ("two micro-batches' states", 2 * micro_tokens * sum(shape.widths) * value_bytes),
    )
    workspace = (("libraries' workspace", WORKSPACE_BYTES), ("pages not filled", UNFILLED_BYTES)) if on_gpu else ()
    phase_2 = (
        *always,
        ("y", step_tokens * width * value_bytes),
        *buffers,
        ("logits of a block", block * chunk * (4 + value_bytes)),
        *workspace,
    )
    phase_3 = (
        *always,
        ("dL/dy", step_tokens * width * value_bytes),
        *buffers,
        ("micro-batch, base width", micro_tokens * width * (OUTPUT_VALUES + read) * value_bytes),
        ("micro-batch, branch width", micro_tokens * block_values(shape) * value_bytes),
        *workspace,
    )
    moving = (
        *always,
        ("dL/dy", step_tokens * width * value_bytes),
        *buffers,
        ("widened on the way", optimizer.passing),
        *workspace,
    )
    return Account(phase_2, phase_3, moving)


def use_gpu_settings() -> None:
    """Before a process first uses a GPU; what the environment says already stays."""
    for name, value in GPU_SETTINGS.items():
        os.environ.setdefault(name, value)


def block_values(shape: BranchShape) -> int:
    """Values a token of all blocks' inputs and of one whose inside is computed again and goes backward: gate and up
    with their slopes and one product, queries, keys and values before and after the rotation, ten of its own width."""
    return 5 * shape.intermediate + 5 * shape.heads * shape.head_width + (10 + shape.blocks) * shape.width
