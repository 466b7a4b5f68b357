"""A branch's weights in two long tensors, of which its parameters are pieces: what the optimizer moves in one go.

Matrices are one [rows, 256] tensor (they take weight decay, and a row is a block of 8-bit moments), vectors another.
The gradients lie alike in memory that the engine lends. Pieces are padded to whole rows; the padding stays zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from mansard.carry_on.branch import Branch

ROW = 256
KINDS = ("matrices", "vectors")


@dataclass(frozen=True, slots=True)
class Piece:
    """A parameter's place: its first value in the tensor of its kind."""

    kind: str
    begin: int
    shape: torch.Size

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The parameter's view of a flat tensor (of weights, gradients or masters)."""
        return flat.view(-1)[self.begin : self.begin + self.shape.numel()].view(self.shape)


class FlatWeights:
    """Takes the branch's weights over: afterwards its parameters are views, on `device` in `dtype` (where they were, as
    they were, if nothing is said)."""

    def __init__(
        self, branch: Branch, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self.pieces: dict[str, Piece] = {}
        sizes = dict.fromkeys(KINDS, 0)
        for name, parameter in branch.named_parameters():
            kind = KINDS[0] if parameter.ndim >= 2 else KINDS[1]
            self.pieces[name] = Piece(kind, sizes[kind], parameter.shape)
            sizes[kind] += -(-parameter.numel() // ROW) * ROW
        place = {"dtype": dtype or branch.project.dtype, "device": device or branch.project.device}
        self.parameters = {
            "matrices": nn.Parameter(torch.zeros(sizes["matrices"] // ROW, ROW, **place)),
            "vectors": nn.Parameter(torch.zeros(sizes["vectors"], **place)),
        }
        self.branch = branch
        with torch.no_grad():
            for name, parameter in branch.named_parameters():
                view = self.pieces[name].of(self.parameters[self.pieces[name].kind].data)
                view.copy_(parameter)
                parameter.data = view

    @property
    def gradient_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.parameters.values())

    def lend(self, memory: torch.Tensor) -> None:
        """Every gradient becomes a zeroed piece of `memory` (bytes); autograd adds into it."""
        begin = 0
        flats: dict[str, torch.Tensor] = {}
        for kind, parameter in self.parameters.items():
            end = begin + parameter.numel() * parameter.element_size()
            flats[kind] = memory[begin:end].view(parameter.dtype).view(parameter.shape).zero_()
            parameter.grad = flats[kind]
            begin = end
        for name, parameter in self.branch.named_parameters():
            parameter.grad = self.pieces[name].of(flats[self.pieces[name].kind])

    def named(self, flats: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The branch's tensors out of flat ones (the optimizer's masters)."""
        return {name: piece.of(flats[piece.kind]) for name, piece in self.pieces.items()}
