"""The training node: a step in three phases, in memory that does not depend on the base's size.

1. The branch runs forward in micro-batches without a graph and leaves y = x + alpha g f for every token of the step.
2. One pass over the streamed head gives the loss and dL/dy (head.py).
3. The branch runs again, micro-batch by micro-batch, each block's inside computed again in backward, and takes dL/dy.

The base is never here: its states come from the cache, its head's rows from the store. To the training loop this is an
engine like the one that trains Pro blocks. Legend: B rows, T tokens of a row, N = B * T, D base width, W all
states' width.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from functools import partial
from typing import Protocol

import torch
from torch.nn.functional import linear

from mansard.carry_on.block import PIECES, Pieces
from mansard.carry_on.branch import packed_mask
from mansard.carry_on.double_buffer import DoubleBuffer
from mansard.carry_on.flat import FlatWeights
from mansard.carry_on.head import Head
from mansard.carry_on.loader import Part
from mansard.carry_on.replay import Replay, compiled
from mansard.carry_on.streamed_loss import head_loss
from mansard.carry_on.wire import decode, decode_into, moved
from mansard.training.data import Batch
from mansard.training.engines import Loss
from mansard.training.optimizer import HeldBytes
from mansard.training.state import random_states, take_random_states


class GivesParts(Protocol):
    """The loader, or what stands for one."""

    def parts(self, batch: Batch) -> list[Part]: ...


class Moves(Protocol):
    """An optimizer of the branch's parameters."""

    @property
    def masters(self) -> Mapping[str, torch.Tensor]: ...

    def step(self, factor: float, clip_norm: float) -> float: ...

    def held_bytes(self) -> HeldBytes: ...

    def state(self) -> dict[str, torch.Tensor]: ...

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None: ...


class BranchEngine:
    """Loss, gradients and steps of one branch. `alpha` is the one of training; evaluation may take others.

    On a GPU gradients are played from CUDA graphs (replay.py), which is what makes the node fast: as separate calls a
    step took 289 ms, of which the device was at work for 80 (H100, 2026-11-26).
    """

    def __init__(
        self,
        weights: FlatWeights,
        head: Head,
        states: GivesParts,
        optimizer: Moves,
        alpha: float,
        clip_norm: float,
    ) -> None:
        self._weights = weights
        self._branch = weights.branch
        self._head = head
        self._states = states
        self._optimizer = optimizer
        self._alpha = alpha
        self._clip_norm = clip_norm
        self._lent = torch.empty(0, dtype=torch.uint8)
        self._y_ND = torch.empty(0)
        self._buffer = DoubleBuffer(self.device)
        self._replay = Replay(self.device, is_recording=True)
        self._direct = Replay(self.device, is_recording=False)
        self._pieces = Pieces(*(compiled(piece, self.device) for piece in astuple(PIECES)))

    @property
    def device(self) -> torch.device:
        return self._branch.project.device

    @property
    def value_bytes(self) -> int:
        """Bytes of a weight."""
        return int(self._branch.project.element_size())

    @property
    def optimizer_bytes(self) -> HeldBytes:
        return self._optimizer.held_bytes()

    @property
    def vocabulary(self) -> int:
        return int(self._head.vocabulary)

    def gradients(self, batch: Batch) -> Loss:
        """Forward and backward of the mean loss over the batch's labels."""
        with self._replay.stream():
            parts = self._states.parts(batch)
            y_ND = self._y_ND = self._joined(parts, self._alpha, self._y_ND, self._replay)
            found = head_loss(self._head, y_ND, batch.labels_BT.flatten(), self._sums(y_ND), self._replay)
            self._weights.lend(self._lent)
            for rows, states_BTW, positions_BT in self._buffer.through(parts, self._put):
                slope_ND = y_ND[rows]  # the gradient took y's place
                pull = partial(self._pull, states_BTW, positions_BT, slope_ND)
                with self._compiled():
                    self._replay.run("pull", pull, states_BTW, positions_BT, slope_ND, self._lent)
            return Loss(float(found.nats_N.sum()), found.labels)

    def step(self, factor: float) -> float:
        """Move the branch at `factor` of its peak rate; the gradients' norm before clipping."""
        with self._replay.stream():  # where the gradients are: what one frees the other takes
            return self._optimizer.step(factor, self._clip_norm)

    def evaluate(self, batches: Sequence[Batch]) -> Loss:
        return self.evaluate_at(batches, self._alpha)

    def evaluate_at(self, batches: Sequence[Batch], alpha: float) -> Loss:
        """The loss at another alpha; at 0 it is the base's own."""
        nats, labels = 0.0, 0
        for batch in batches:
            y_ND = self._joined(self._states.parts(batch), alpha, None, self._direct)
            found = head_loss(self._head, y_ND, batch.labels_BT.flatten(), None)
            nats += float(found.nats_N.sum())
            labels += found.labels
        return Loss(nats, labels)

    def trained(self) -> dict[str, torch.Tensor]:
        """The branch's tensors, in float32 where the optimizer keeps masters."""
        return self._weights.named({kind: master.detach() for kind, master in self._optimizer.masters.items()})

    def state(self) -> dict[str, torch.Tensor]:
        """Branch, optimizer and random generators."""
        return {**self._optimizer.state(), **random_states()}

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._optimizer.load_state(take_random_states(tensors))

    def _joined(
        self, parts: Sequence[Part], alpha: float, into_ND: torch.Tensor | None, replay: Replay
    ) -> torch.Tensor:
        """y [N, D] of the whole batch, without a graph; in `into_ND` where that has the shape."""
        wanted = (parts[-1].rows.stop, self._branch.shape.base_width)
        if into_ND is None or into_ND.shape != wanted:
            into_ND = torch.empty(wanted, dtype=self._branch.project.dtype, device=self.device)
        with torch.no_grad():
            for rows, states_BTW, positions_BT in self._buffer.through(parts, self._put):
                y_ND = into_ND[rows]
                join = partial(self._join, states_BTW, positions_BT, y_ND, alpha)
                with self._compiled():
                    replay.run(f"join {alpha}", join, states_BTW, positions_BT, y_ND)
        return into_ND

    def _join(self, states_BTW: torch.Tensor, positions_BT: torch.Tensor, y_ND: torch.Tensor, alpha: float) -> None:
        """x + alpha g f into `y_ND`."""
        x_ND = states_BTW[..., : self._branch.shape.base_width].flatten(0, 1)
        if alpha == 0.0:
            y_ND.copy_(x_ND)
            return
        branch = self._branch
        last_Nd = branch.last(states_BTW, positions_BT, packed_mask(positions_BT)).flatten(0, 1)
        delta_ND = linear(last_Nd, branch.mixer).sigmoid_().mul_(linear(last_Nd, branch.output))
        torch.add(x_ND, delta_ND, alpha=alpha, out=y_ND)

    def _pull(self, states_BTW: torch.Tensor, positions_BT: torch.Tensor, slope_ND: torch.Tensor) -> None:
        """dL/dy times alpha goes backward through g f, into the branch's gradients.

        The last two products' gradients are written out: autograd would hold seven D-wide values a token for them."""
        branch = self._branch
        last_BTd = branch.last(states_BTW, positions_BT, packed_mask(positions_BT))
        with torch.no_grad():
            last_Nd = last_BTd.detach().flatten(0, 1)
            products = linear(last_Nd, branch.mixer), linear(last_Nd, branch.output)
            slopes = compiled(_slopes, self.device)(*products, slope_ND, self._alpha)
            pulled_Nd = torch.zeros_like(last_Nd)
            for weight, slope_of in zip((branch.mixer, branch.output), slopes, strict=True):
                weight.grad.addmm_(slope_of.T, last_Nd)
                pulled_Nd.addmm_(slope_of, weight)
        last_BTd.backward(pulled_Nd.view(last_BTd.shape))

    @contextmanager
    def _compiled(self) -> Iterator[None]:
        """The blocks as training runs them; whoever else has the branch (to generate, any length) gets them plain."""
        blocks = self._branch.blocks
        for block in blocks:
            block.pieces = self._pieces
        try:
            yield
        finally:
            for block in blocks:
                block.pieces = PIECES

    def _put(self, part: Part, turn: int) -> tuple[slice, torch.Tensor, torch.Tensor]:
        """A micro-batch's rows of N, its states [b, T, W], x first, in the branch's type, and its positions, on the
        device."""
        dtype, shape = self._branch.project.dtype, part.positions_BT.shape
        if self.device.type != "cuda":
            return part.rows, decode(part.coded, part.first_rows, dtype).view(*shape, -1), part.positions_BT
        states_ND = part.coded.states_ND
        there_ND = self._buffer.room("states", turn, states_ND.shape, dtype)
        if part.coded.scales_N is None:
            there_ND.copy_(states_ND, non_blocking=True)
        else:
            first_rows = part.first_rows.to(self.device, non_blocking=True)
            decode_into(there_ND, moved(part.coded, self.device), first_rows)
        positions_BT = self._buffer.room("positions", turn, shape, torch.int64)
        positions_BT.copy_(part.positions_BT, non_blocking=True)
        return part.rows, there_ND.view(*shape, -1), positions_BT

    def _sums(self, y_ND: torch.Tensor) -> torch.Tensor:
        """Float32 like y, in the memory that holds the gradients in phase 3: the two are never there together."""
        wanted = max(4 * y_ND.numel(), self._weights.gradient_bytes)
        if len(self._lent) < wanted:
            self._lent = torch.empty(wanted, dtype=torch.uint8, device=y_ND.device)
        return self._lent[: 4 * y_ND.numel()].view(torch.float32).view(y_ND.shape)


def _slopes(
    mixed_ND: torch.Tensor, f_ND: torch.Tensor, slope_ND: torch.Tensor, alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """dL/d(mixer's product) and dL/df in the memory of the two, at y = x + alpha sigmoid(mixer's product) f.

    In their type throughout, as autograd would have it."""
    g_ND = mixed_ND.sigmoid_()
    pulled_ND = slope_ND * alpha
    df_ND = pulled_ND * g_ND
    pulled_ND = df_ND * f_ND
    return g_ND.neg_().add_(1).mul_(pulled_ND), f_ND.copy_(df_ND)
