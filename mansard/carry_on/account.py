"""The training node's memory, item by item, before the first step.

Phase 2 holds y and the float32 sums of p W, phase 3 the gradients (in the same memory) and a micro-batch's activations;
the optimizer's step comes after them. The largest of the three is the peak. Legend: P parameters, N tokens of a step, n
of a micro-batch, D base width, C rows of a chunk.
"""

from dataclasses import dataclass

from mansard.carry_on.head import CHUNK_ROWS
from mansard.carry_on.streamed_loss import BLOCK_TOKENS
from mansard.composition.shape import BranchShape
from mansard.training.optimizer import HeldBytes

WORKSPACE_BYTES = 34_000_000
"""cuBLAS's workspace on Hopper (32 MiB, measured 2026-11) and what the allocator rounds up."""
OUTPUT_VALUES = 2
"""D-wide values a token that a micro-batch's backward holds: f and the mixer's product, then their gradients."""
TAP_VALUES = 2
"""The same for every state that is tapped: normed, weighted."""
BLOCK_VALUES = 12
"""Values a token in units of the branch's width that one block holds while its inside is computed again."""


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
    shape: BranchShape, vocabulary: int, step_tokens: int, micro_tokens: int, value_bytes: int, optimizer: HeldBytes
) -> Account:
    """`value_bytes` of a weight (2: bf16, 4: float32)."""
    parameters, width = shape.parameters, shape.base_width
    chunk, block = min(CHUNK_ROWS, vocabulary), min(BLOCK_TOKENS, step_tokens)
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
    workspace = ("library workspace", WORKSPACE_BYTES)
    phase_2 = (
        *always,
        ("y", step_tokens * width * value_bytes),
        *buffers,
        ("logits of a block", block * chunk * (4 + value_bytes)),
        workspace,
    )
    phase_3 = (
        *always,
        ("dL/dy", step_tokens * width * value_bytes),
        *buffers,
        ("micro-batch, base width", micro_tokens * width * (OUTPUT_VALUES + read) * value_bytes),
        ("micro-batch, branch width", micro_tokens * shape.width * (BLOCK_VALUES + shape.blocks) * value_bytes),
        workspace,
    )
    moving = (
        *always,
        ("dL/dy", step_tokens * width * value_bytes),
        *buffers,
        ("widened on the way", optimizer.passing),
        workspace,
    )
    return Account(phase_2, phase_3, moving)
