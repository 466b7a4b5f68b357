"""The training node: a step in three phases, in memory that does not depend on the base's size.

1. The branch runs forward in micro-batches without a graph and leaves y = x + alpha g f for every token of the step.
2. One pass over the streamed head gives the loss and dL/dy (head.py).
3. The branch runs again, micro-batch by micro-batch, each block's inside computed again in backward, and takes dL/dy.

The base is never here: its states come from the cache, its head's rows from the store. To the training loop this is an
engine like the one that trains Pro blocks. Legend: B rows, T tokens of a row, N = B * T, D base width, W all
states' width.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from mansard.carry_on.branch import joined, packed_mask
from mansard.carry_on.flat import FlatWeights
from mansard.carry_on.head import Head, head_loss
from mansard.carry_on.loader import Part
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
    """Loss, gradients and steps of one branch. `alpha` is the one of training; evaluation may take others."""

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
        parts = self._states.parts(batch)
        y_ND = self._y_ND = self._joined(parts, self._alpha, self._y_ND)
        found = head_loss(self._head, y_ND, batch.labels_BT.flatten(), self._sums(y_ND))
        self._weights.lend(self._lent)
        for part in parts:
            states_BTW, positions_BT, mask = self._inputs(part)
            delta_BTD = self._branch(states_BTW, positions_BT, mask)
            pulled_BTD = y_ND[part.rows].view(delta_BTD.shape).mul_(self._alpha)  # the gradient took y's place
            delta_BTD.backward(pulled_BTD.to(delta_BTD.dtype))
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
            y_ND = self._joined(self._states.parts(batch), alpha, None)
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

    def _joined(self, parts: Sequence[Part], alpha: float, into_ND: torch.Tensor | None) -> torch.Tensor:
        """y [N, D] of the whole batch, without a graph; in `into_ND` where that has the shape."""
        tokens = parts[-1].rows.stop
        y_ND: torch.Tensor | None = None
        with torch.no_grad():
            for part in parts:
                states_BTW, positions_BT, mask = self._inputs(part)
                x_BTD = states_BTW[..., : self._branch.shape.base_width]
                if y_ND is None:
                    wanted = (tokens, x_BTD.shape[-1])
                    fits = into_ND is not None and into_ND.shape == wanted
                    y_ND = into_ND if fits else torch.empty(wanted, dtype=x_BTD.dtype, device=x_BTD.device)
                assert y_ND is not None, "made for the first part"
                made = x_BTD
                if alpha != 0.0:
                    made = joined(x_BTD, self._branch(states_BTW, positions_BT, mask), alpha)
                y_ND[part.rows] = made.flatten(0, 1)
        assert y_ND is not None, "a batch has rows"
        return y_ND

    def _inputs(self, part: Part) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """States [b, T, W], x first, in the branch's type, positions and mask of a micro-batch, on its device."""
        coded = moved(part.coded, self.device)
        states_NW = decode(coded, part.first_rows.to(self.device, non_blocking=True), self._branch.project.dtype)
        positions_BT = part.positions_BT.to(self.device, non_blocking=True)
        return states_NW.view(*positions_BT.shape, -1), positions_BT, packed_mask(positions_BT)

    def _sums(self, y_ND: torch.Tensor) -> torch.Tensor:
        """Float32 like y, in the memory that holds the gradients in phase 3: the two are never there together."""
        wanted = max(4 * y_ND.numel(), self._weights.gradient_bytes)
        if len(self._lent) < wanted:
            self._lent = torch.empty(wanted, dtype=torch.uint8, device=y_ND.device)
        return self._lent[: 4 * y_ND.numel()].view(torch.float32).view(y_ND.shape)
