"""One process that computes losses and moves weights: the seam behind which several will do the same.

The loop knows `gradients`, `step`, `evaluate`, `state`, `load_state` and `trained`, and nothing of devices or of
processes. Legend: B rows, T tokens, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from mansard.training.data import Batch
from mansard.training.optimizer import Group, MasterAdamW
from mansard.training.packing import IGNORED, masks_of

CPU_THREADS = 1
"""Fixed, because sums over another number of threads round differently and resumed runs must end bit-identical. One,
because small models synchronize often: a second thread gave 1.5 times the speed on two idle cores, and below a tenth of
one thread's beside two busy processes (measured 2026-11-22, the demo's shapes)."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Summed negative log-likelihood in nats over `labels` predicted tokens."""

    nats: float
    labels: int

    @property
    def mean(self) -> float:
        return self.nats / self.labels if self.labels else math.nan


class LocalEngine:
    """The model in this process, on the device it is on. Below the first trained block autograd records nothing."""

    def __init__(self, model: Any, groups: Sequence[Group], weight_decay: float, clip_norm: float) -> None:  # noqa: ANN401
        self._model = model
        self._clip_norm = clip_norm
        self._optimizer = MasterAdamW(groups, weight_decay)

    def gradients(self, batch: Batch) -> Loss:
        """Forward and backward of the mean loss over the batch's labels."""
        self._model.train()
        nats, labels = self._nats(batch)
        (nats / labels).backward()
        return Loss(float(nats.detach()), labels)

    def step(self, factor: float) -> float:
        """Move the trained tensors at `factor` of their peak rates; the gradients' norm before clipping."""
        return self._optimizer.step(factor, self._clip_norm)

    def evaluate(self, batches: Sequence[Batch]) -> Loss:
        self._model.eval()
        with torch.no_grad():
            sums = [self._nats(batch) for batch in batches]
        return Loss(sum(float(nats) for nats, _ in sums), sum(labels for _, labels in sums))

    def trained(self) -> dict[str, torch.Tensor]:
        """The float32 masters under the names of the parameters."""
        return {name: master.detach() for name, master in self._optimizer.masters.items()}

    def state(self) -> dict[str, torch.Tensor]:
        """Trained tensors, optimizer and random generators; never the base."""
        generators = {"rng/cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            generators["rng/cuda"] = torch.cuda.get_rng_state()
        return {**self._optimizer.state(), **generators}

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        torch.set_rng_state(tensors["rng/cpu"])
        if "rng/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng/cuda"])
        self._optimizer.load_state({k: v for k, v in tensors.items() if not k.startswith("rng/")})

    def _nats(self, batch: Batch) -> tuple[torch.Tensor, int]:
        device, dtype = self._model.device, self._model.dtype
        positions_BT = batch.positions_BT.to(device)
        logits_BTV = self._model(
            input_ids=batch.tokens_BT.to(device),
            position_ids=positions_BT,
            attention_mask=masks_of(self._model.config, positions_BT, dtype),
            use_cache=False,
        ).logits
        labels_BT = batch.labels_BT.to(device)
        nats = cross_entropy(
            logits_BTV.float().flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return nats, int((batch.labels_BT != IGNORED).sum())
