"""The shape of a branch: pure arithmetic, no torch.

A branch reads x (the base's state after its final norm, D wide) through a projection D -> d, runs decoder blocks at
width d, and gives two D-wide outputs: f and the mixer g = sigmoid(.). y(alpha) = W_head (x + alpha * g * f) (GPT
Carry-On, arXiv 2504.07513). Legend: D base width, d branch width.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mansard.errors import BadInput

SMALL_HEAD, LARGE_HEAD = 64, 128
"""Head sizes that vLLM's attention kernels take (16 fails on the CPU at the first request, measured 2026-11)."""
LARGE_HEAD_FROM = 1024


@dataclass(frozen=True, slots=True)
class BranchShape:
    """`intermediate` is the width of the gated MLP. Heads of queries and of keys are as many."""

    base_width: int
    width: int
    blocks: int
    heads: int
    head_width: int
    intermediate: int
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-5

    @property
    def parameters(self) -> int:
        """Trained values: projection, blocks, the last norm, both outputs."""
        attention = self.width * self.heads * self.head_width * 4
        block = attention + 3 * self.width * self.intermediate + 2 * self.width
        return 3 * self.base_width * self.width + self.blocks * block + self.width

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "BranchShape":
        """BadInput where a key is unknown or missing."""
        try:
            return BranchShape(**value)
        except TypeError as error:
            raise BadInput(f"branch shape {dict(value)}: {error}") from error


def shape_of(base_width: int, width: int, blocks: int) -> BranchShape:
    """The proportions that every branch has: heads that fill the width, an MLP of 8/3 of it (a Llama's)."""
    head = LARGE_HEAD if width >= LARGE_HEAD_FROM else SMALL_HEAD
    heads = max(round(width / head), 1)
    grain = grain_of(width)
    return BranchShape(base_width, width, blocks, heads, head, max(round(width * 8 / 3 / grain), 1) * grain)


def grain_of(width: int) -> int:
    """Widths are multiples of it: 64 from 256 up, for the matrix units of GPUs and whole blocks of 8-bit moments."""
    return 64 if width >= 256 else 8


def shape_of_size(base_width: int, parameters: int, blocks: int = 2) -> BranchShape:
    """The widest branch of at most `parameters`; BadInput where even the narrowest (width 8) has more."""
    best, width = shape_of(base_width, 8, blocks), 8
    if best.parameters > parameters:
        raise BadInput(
            f"branch.parameters {parameters:,}: {blocks} blocks beside a base of width {base_width} have at least "
            f"{best.parameters:,}; raise it"
        )
    while (wider := shape_of(base_width, width + grain_of(width), blocks)).parameters <= parameters:
        best, width = wider, wider.width
    return best
