"""The training node: a step in three phases, in memory that does not depend on the base's size.

1. The branch runs forward in micro-batches without a graph and leaves y = x + alpha g f for every token of the step.
2. One pass over the streamed head gives the loss and dL/dy (head.py).
3. The branch runs again, micro-batch by micro-batch, each block's inside computed again in backward, and takes dL/dy.

The base is never here: its states come from the cache, its head's rows from the store. To the training loop this is an
engine like the one that trains Pro blocks. Legend: B rows, T tokens of a row, N = B * T, D base width, W all
states' width.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

import torch

from mansard.carry_on.branch import joined, packed_mask
from mansard.carry_on.flat import FlatWeights
from mansard.carry_on.head import Head, head_loss
from mansard.carry_on.loader import Part
from mansard.carry_on.replay import Replay
from mansard.carry_on.wire import decode, moved
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

    `is_recording`: gradients are played from CUDA graphs (replay.py). Written and not yet run on a GPU (2026-11), so
    nothing but the benchmark asks for it.
    """

    def __init__(
        self,
        weights: FlatWeights,
        head: Head,
        states: GivesParts,
        optimizer: Moves,
        alpha: float,
        clip_norm: float,
        is_recording: bool = False,
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
        self._replay = Replay(self.device, is_recording)
        self._direct = Replay(self.device, is_recording=False)

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
            for part in parts:
                states_BTW, positions_BT = self._inputs(part, self._replay)
                slope_BTD = y_ND[part.rows].view(*positions_BT.shape, -1)  # the gradient took y's place
                pull = partial(self._pull, states_BTW, positions_BT, slope_BTD)
                self._replay.run("pull", pull, states_BTW, positions_BT, slope_BTD, self._lent)
            return Loss(float(found.nats_N.sum()), found.labels)

    def step(self, factor: float) -> float:
        """Move the branch at `factor` of its peak rate; the gradients' norm before clipping."""
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
            for part in parts:
                states_BTW, positions_BT = self._inputs(part, replay)
                y_BTD = into_ND[part.rows].view(*positions_BT.shape, -1)
                join = partial(self._join, states_BTW, positions_BT, y_BTD, alpha)
                replay.run(f"join {alpha}", join, states_BTW, positions_BT, y_BTD)
        return into_ND

    def _join(
        self, states_BTW: torch.Tensor, positions_BT: torch.Tensor, y_BTD: torch.Tensor, alpha: float
    ) -> None:
        """x + alpha g f into `y_BTD`."""
        x_BTD = states_BTW[..., : self._branch.shape.base_width]
        if alpha != 0.0:
            x_BTD = joined(x_BTD, self._branch(states_BTW, positions_BT, packed_mask(positions_BT)), alpha)
        y_BTD.copy_(x_BTD)

    def _pull(self, states_BTW: torch.Tensor, positions_BT: torch.Tensor, slope_BTD: torch.Tensor) -> None:
        """dL/dy times alpha goes backward through g f, into the branch's gradients."""
        delta_BTD = self._branch(states_BTW, positions_BT, packed_mask(positions_BT))
        delta_BTD.backward((slope_BTD * self._alpha).to(delta_BTD.dtype))

    def _inputs(self, part: Part, replay: Replay) -> tuple[torch.Tensor, torch.Tensor]:
        """States [b, T, W], x first, in the branch's type, and positions of a micro-batch, on its device."""
        coded = moved(part.coded, self.device)
        states_NW = decode(coded, part.first_rows.to(self.device, non_blocking=True), self._branch.project.dtype)
        positions_BT = replay.fixed("positions", part.positions_BT.to(self.device, non_blocking=True))
        return replay.fixed("states", states_NW.view(*positions_BT.shape, -1)), positions_BT

    def _sums(self, y_ND: torch.Tensor) -> torch.Tensor:
        """Float32 like y, in the memory that holds the gradients in phase 3: the two are never there together."""
        wanted = max(4 * y_ND.numel(), self._weights.gradient_bytes)
        if len(self._lent) < wanted:
            self._lent = torch.empty(wanted, dtype=torch.uint8, device=y_ND.device)
        return self._lent[: 4 * y_ND.numel()].view(torch.float32).view(y_ND.shape)
