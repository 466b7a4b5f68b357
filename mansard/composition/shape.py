"""The shape of a branch: pure arithmetic, no torch.

A branch reads x (the base's state after its final norm, D wide) through a projection D -> d, runs decoder blocks at
width d, and gives two D-wide outputs: f and the mixer g = sigmoid(.). y(alpha) = W_head (x + alpha * g * f) (GPT
Carry-On, arXiv 2504.07513). Beside x it may read layers of the base below the last one (taps), and final states of
other bases (a mixture); x stays the place where it is added. Legend: D base width, d branch width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mansard.errors import BadInput

SMALL_HEAD, LARGE_HEAD = 64, 128
"""Head sizes that vLLM's attention kernels take (16 fails on the CPU at the first request, measured 2026-11)."""
LARGE_HEAD_FROM = 1024


@dataclass(frozen=True, slots=True)
class BranchShape:
    """`intermediate` is the width of the gated MLP. Heads of queries and of keys are as many. `taps` are layers: tap i
    is the residual stream after i decoder layers; each has a projection of its own where `tap_projections`, or else
    all share one. `others` are the widths of the other bases of a mixture."""

    base_width: int
    width: int
    blocks: int
    heads: int
    head_width: int
    intermediate: int
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-5
    taps: tuple[int, ...] = ()
    others: tuple[int, ...] = ()
    tap_projections: bool = False

    @property
    def widths(self) -> tuple[int, ...]:
        """What a token's states consist of, in order: the final state, the taps, the other bases' final states."""
        return (self.base_width,) * (1 + len(self.taps)) + self.others

    @property
    def parameters(self) -> int:
        """Trained values: projections, taps' norms and weights, blocks, the last norm, both outputs."""
        attention = self.width * self.heads * self.head_width * 4
        block = attention + 3 * self.width * self.intermediate + 2 * self.width
        tap_width = (1 + len(self.taps)) * self.base_width
        if self.tap_projections:
            tap_width = len(self.taps) * self.base_width * self.width
        taps = tap_width + 1 + len(self.taps) if self.taps else 0
        others = sum(self.others) * self.width + 1 + len(self.others) if self.others else 0
        return 3 * self.base_width * self.width + self.blocks * block + self.width + taps + others

    def as_json(self) -> dict[str, Any]:
        """Taps and other bases only where there are any: a plain branch is described as before they existed."""
        told = asdict(self)
        lists = {key: list(told.pop(key)) for key in ("taps", "others")} | {"tap_projections": told["tap_projections"]}
        del told["tap_projections"]
        return told | {key: value for key, value in lists.items() if value}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "BranchShape":
        """BadInput where a key is unknown or missing."""
        try:
            shape = BranchShape(**value)
            return replace(shape, taps=tuple(shape.taps), others=tuple(shape.others))
        except TypeError as error:
            raise BadInput(f"branch shape {dict(value)}: {error}") from error


def shape_of(
    base_width: int,
    width: int,
    blocks: int,
    taps: Sequence[int] = (),
    others: Sequence[int] = (),
    tap_projections: bool = False,
) -> BranchShape:
    """The proportions that every branch has: heads that fill the width, an MLP of 8/3 of it (a Llama's)."""
    head = LARGE_HEAD if width >= LARGE_HEAD_FROM else SMALL_HEAD
    heads = max(round(width / head), 1)
    grain = grain_of(width)
    intermediate = max(round(width * 8 / 3 / grain), 1) * grain
    return BranchShape(
        base_width,
        width,
        blocks,
        heads,
        head,
        intermediate,
        taps=tuple(taps),
        others=tuple(others),
        tap_projections=tap_projections and bool(taps),
    )


def grain_of(width: int) -> int:
    """Widths are multiples of it: 64 from 256 up, for the matrix units of GPUs and whole blocks of 8-bit moments."""
    return 64 if width >= 256 else 8


def shape_of_size(
    base_width: int,
    parameters: int,
    blocks: int = 2,
    taps: Sequence[int] = (),
    others: Sequence[int] = (),
    tap_projections: bool = False,
) -> BranchShape:
    """The widest branch of at most `parameters`; BadInput where even the narrowest (width 8) has more."""
    best, width = shape_of(base_width, 8, blocks, taps, others, tap_projections), 8
    if best.parameters > parameters:
        raise BadInput(
            f"branch.parameters {parameters:,}: {blocks} blocks beside a base of width {base_width} have at least "
            f"{best.parameters:,}; raise it"
        )
    while True:
        wider = shape_of(base_width, width + grain_of(width), blocks, taps, others, tap_projections)
        if wider.parameters > parameters:
            return best
        best, width = wider, wider.width
