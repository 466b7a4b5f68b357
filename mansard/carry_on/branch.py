"""The branch in plain torch: what trains, and what the Hugging Face class and the tests compute.

Only f's output projection starts at zero: then f = 0 and y = x whatever alpha is, and gradients reach f's projection at
the first step and the rest from the second on (were the mixer's zero as well, g would be 1/2 everywhere and still move;
were f and the mixer's product cut at both ends, nothing would). Taps are normed, weighted by a softmax and summed,
before one projection (each norm has weights of its own) or after a projection each; the bases of a mixture have a
projection each, weighted and summed after it. Legend: B rows, T tokens, D base width, W all states' width (x first), d
branch width, S keys.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn.functional import rms_norm

from mansard.carry_on.block import Block, Keep, matrix, norm, rotation_of
from mansard.carry_on.products import product
from mansard.composition.shape import BranchShape


class Branch(nn.Module):  # type: ignore[misc]
    """States W wide, x first -> g * f, D wide."""

    def __init__(self, shape: BranchShape) -> None:
        super().__init__()
        self.shape = shape
        self.project = matrix(shape.width, shape.base_width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.blocks))
        self.norm = nn.Parameter(torch.ones(shape.width))
        self.output = nn.Parameter(torch.zeros(shape.base_width, shape.width))
        self.mixer = matrix(shape.base_width, shape.width)
        if shape.taps:
            self.tap_weights = nn.Parameter(torch.ones(1 + len(shape.taps)))
        if shape.tap_projections:
            self.tap_projects = nn.ParameterList(matrix(shape.width, shape.base_width) for _ in shape.taps)
        elif shape.taps:
            self.tap_norms = nn.ParameterList(torch.ones(shape.base_width) for _ in range(1 + len(shape.taps)))
        if shape.others:
            self.base_weights = nn.Parameter(torch.ones(1 + len(shape.others)))
            self.other_projects = nn.ParameterList(matrix(shape.width, width) for width in shape.others)

    def start(self, seed: int) -> None:
        """Random weights of deviation 0.02 (blocks' outputs divided by the depth's root, as GPT-2), f's output zero;
        taps and bases of even weights."""
        generator = torch.Generator().manual_seed(seed)
        depth = (2 * self.shape.blocks) ** 0.5
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 1:
                    parameter.fill_(1.0)
                elif name == "output":
                    parameter.zero_()
                else:
                    last = name.endswith(("attention_output", "down"))
                    reads = name == "project" or name.startswith(("tap_projects", "other_projects"))
                    deviation = parameter.shape[1] ** -0.5 if reads else 0.02 / (depth if last else 1.0)
                    values = torch.randn(parameter.shape, generator=generator) * deviation
                    parameter.copy_(values)

    def forward(
        self, states_BTW: torch.Tensor, positions_BT: torch.Tensor, mask: torch.Tensor, keep: Keep | None = None
    ) -> torch.Tensor:
        """g * f of the states in the branch's type. `mask` [B, 1, T, S] is true where a token sees a key."""
        last_BTd = self.last(states_BTW, positions_BT, mask, keep)
        return torch.sigmoid(product(last_BTd, self.mixer)) * product(last_BTd, self.output)

    def last(
        self, states_BTW: torch.Tensor, positions_BT: torch.Tensor, mask: torch.Tensor, keep: Keep | None = None
    ) -> torch.Tensor:
        """What mixer and f's projection read, d wide."""
        h_BTd = self.read(states_BTW.to(self.project.dtype))
        rotation = rotation_of(self.shape, positions_BT, h_BTd.dtype)
        for number, block in enumerate(self.blocks):
            h_BTd = self.run_block(block, h_BTd, rotation, mask, keep, number)
        return norm(h_BTd, self.norm, self.shape.norm_epsilon)

    def read(self, states_BTW: torch.Tensor) -> torch.Tensor:
        """What the blocks begin with, d wide."""
        shape = self.shape
        if not (shape.taps or shape.others):
            return product(states_BTW, self.project)
        parts = states_BTW.split(shape.widths, dim=-1)
        h_BTd = self.read_taps(parts[: 1 + len(shape.taps)]) if shape.taps else product(parts[0], self.project)
        if not shape.others:
            return h_BTd
        others = zip(parts[-len(shape.others) :], self.other_projects, strict=True)
        return _weighted(self.base_weights, [h_BTd, *(product(x, project) for x, project in others)])

    def read_taps(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The final state's and the taps', normed, d wide."""
        epsilon = self.shape.norm_epsilon
        if self.shape.tap_projections:
            pairs = zip(parts, [self.project, *self.tap_projects], strict=True)
            read = [product(rms_norm(p, p.shape[-1:], None, epsilon), project) for p, project in pairs]
            return _weighted(self.tap_weights, read)
        normed = [rms_norm(p, p.shape[-1:], w, epsilon) for p, w in zip(parts, self.tap_norms, strict=True)]
        return product(_weighted(self.tap_weights, normed), self.project)

    def run_block(self, block: nn.Module, *arguments: Any) -> torch.Tensor:  # noqa: ANN401 - the block's own
        """One block; with gradients its inside is computed again in backward, so that only its input is kept."""
        if torch.is_grad_enabled():
            checkpointed = torch.utils.checkpoint.checkpoint
            return cast(torch.Tensor, checkpointed(block, *arguments, use_reentrant=False, preserve_rng_state=False))
        return cast(torch.Tensor, block(*arguments))


def joined(x_BTD: torch.Tensor, delta_BTD: torch.Tensor, alpha: float) -> torch.Tensor:
    """x + alpha * delta in x's type; at alpha 0 it is x itself, bit for bit."""
    return x_BTD if alpha == 0.0 else x_BTD + alpha * delta_BTD.to(x_BTD.dtype)


def packed_mask(positions_BT: torch.Tensor) -> torch.Tensor:
    """[B, 1, T, T]: true inside the past of a segment (a segment starts at position 0)."""
    segments_BT = (positions_BT == 0).cumsum(-1)
    length = positions_BT.shape[1]
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=positions_BT.device).tril()
    return ((segments_BT[:, :, None] == segments_BT[:, None, :]) & causal_TT)[:, None]


def names_of(shape: BranchShape) -> dict[str, tuple[int, ...]]:
    """Every tensor of a branch and its shape."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Branch(shape).named_parameters()}


def problems_of(shape: BranchShape, found: Iterable[tuple[str, tuple[int, ...]]]) -> list[str]:
    """What is missing, left over or of another shape, one phrase each."""
    wanted, there = names_of(shape), dict(found)
    return [
        *(f"{n} is missing" for n in wanted if n not in there),
        *(f"{n} is not a tensor of this branch" for n in there if n not in wanted),
        *(f"{n} has shape {list(there[n])}, not {list(s)}" for n, s in wanted.items() if n in there and there[n] != s),
    ]


def _weighted(weights_K: torch.Tensor, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The parts' sum, each times its share of the weights' softmax."""
    shares_K = weights_K.float().softmax(0).to(parts[0].dtype)
    return torch.stack([share * part for share, part in zip(shares_K, parts, strict=True)]).sum(0)
