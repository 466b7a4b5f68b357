"""What computes losses and moves weights, in one process; deepspeed_engine.py does it in several.

The loop knows what `Engine` says and nothing of processes. Legend: B rows, T tokens, V vocabulary.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from mansard.models.bypass import bypassed
from mansard.models.freeze import digest_tensors
from mansard.training.anchor import Anchor
from mansard.training.attention import attention_inputs, preferred_kernels, use_packed_attention
from mansard.training.cpu_blocks import speed_up
from mansard.training.data import Batch
from mansard.training.decoder import Decoder
from mansard.training.head_loss import HeadLoss
from mansard.training.optimizer import Group, MasterAdamW, StepBytes
from mansard.training.packing import IGNORED
from mansard.training.state import random_states, take_random_states

CPU_THREADS = 1
"""Fixed, because sums over another number of threads round differently and resumed runs must end bit-identical. One,
because small models synchronize often: a second thread gave 1.5 times the speed on two idle cores, and below a tenth of
one thread's beside two busy processes (measured 2026-11-22, the demo's shapes)."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Summed negative log-likelihood in nats over `labels` predicted tokens; `drift` is how far the general ones among
    them are from the base's, summed, where training is anchored."""

    nats: float
    labels: int
    drift: float = 0.0

    @property
    def mean(self) -> float:
        return self.nats / self.labels if self.labels else math.nan


class Engine(Protocol):
    """What the loop knows. `state` is what a checkpoint holds: trained tensors, optimizer, generators; never the base.
    """

    @property
    def device(self) -> torch.device: ...

    def gradients(self, batch: Batch) -> Loss:
        """Forward and backward of the mean loss over the batch's labels, a micro-batch at a time."""

    def step(self, factor: float) -> float:
        """Move the trained tensors at `factor` of their peak rates; the gradients' norm before clipping."""

    def evaluate(self, batches: Sequence[Batch]) -> Loss: ...

    def state(self) -> dict[str, torch.Tensor]: ...

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None: ...


class Objective(nn.Module):
    """A model's forward pass with its loss, on the device it is on: a batch's summed loss in nats and its drift
    (float32 [2]), or its logits. Below the first trained block autograd records nothing."""

    def __init__(self, model: Any, anchor: Anchor | None = None) -> None:  # noqa: ANN401 - a transformers model; modified
        super().__init__()
        use_packed_attention(model)
        self.model = model
        self.anchor = anchor
        self.decoder = Decoder(model)
        softcap = getattr(model.config, "final_logit_softcapping", None)
        self.head_loss = HeadLoss(model.get_output_embeddings(), softcap, self.device)

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    def forward(self, batch: Batch, wants_logits: bool = False) -> torch.Tensor:
        hidden_BTH = self.hidden(batch)
        if wants_logits:
            return self.head_loss.logits(hidden_BTH)
        return torch.stack((self.nats(hidden_BTH, batch.labels_BT), self._drift(hidden_BTH, batch)))

    def weighed(self, sums: torch.Tensor) -> torch.Tensor:
        """What is minimised, of a batch's summed (nats, drift)."""
        return sums[0] if self.anchor is None else sums[0] + self.anchor.weight * sums[1]

    def _drift(self, hidden_BTH: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Of the rows of general text, summed: how far they are from what the base computes, which is this model with
        its new blocks passed by. Zero without an anchor, and in evaluation."""
        rows = batch.general_rows
        if self.anchor is None or not self.training or len(rows) == 0:
            return hidden_BTH.new_zeros((), dtype=torch.float32)
        general = batch.rows(rows)
        with torch.no_grad(), bypassed(self.decoder.module.layers, self.anchor.new_blocks):
            base_BTH = self.hidden(general)
        is_label_N = (general.labels_BT != IGNORED).flatten().to(self.device, non_blocking=True)
        here_BTH = hidden_BTH[rows.to(self.device)]
        return self.anchor.drift(self.head_loss, here_BTH.flatten(0, 1), base_BTH.flatten(0, 1), is_label_N)

    def hidden(self, batch: Batch) -> torch.Tensor:
        """The decoder's last states [B, T, H], on the device; the batch is on the CPU."""
        device = self.device
        with preferred_kernels(device):
            states: torch.Tensor = self.decoder.module(
                input_ids=batch.tokens_BT.to(device, non_blocking=True),
                position_ids=batch.positions_BT.to(device, non_blocking=True),
                use_cache=False,
                **attention_inputs(self.model.config, batch.positions_BT, self.model.dtype, device),
            ).last_hidden_state
        return states

    def nats(self, hidden_BTH: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        """Summed over the labels, a float32 scalar on the device."""
        return self.head_loss(hidden_BTH, labels_BT.to(self.device, non_blocking=True))

    def bfloat16(self) -> "Objective":
        """DeepSpeed asks for it; the model is in its types already, FP8 weights and their scales among them."""
        return self


class ModelEngine:
    """What engines of a whole model share. `module` is what is called for the forward pass: `objective` itself, or what
    a library has put around it."""

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - a transformers model; modified
        micro_batch_sequences: int | None,
        anchor: Anchor | None = None,
    ) -> None:
        self.objective = Objective(model, anchor)
        self.module: nn.Module = self.objective
        self.micro_batch_sequences = micro_batch_sequences

    @property
    def device(self) -> torch.device:
        return self.objective.device

    def evaluate(self, batches: Sequence[Batch]) -> Loss:
        self.module.eval()
        parts = [part for batch in batches for part in batch.parts(self.micro_batch_sequences)]
        with torch.no_grad():
            nats = sum(float(self.module(part)[0]) for part in parts)
        return Loss(nats, sum(int((part.labels_BT != IGNORED).sum()) for part in parts))

    def logits(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] in float32, on the CPU, of rows that are one document each."""
        self.module.eval()
        positions_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
        with torch.no_grad():
            logits_BTV: torch.Tensor = self.module(Batch(tokens_BT, positions_BT, tokens_BT), wants_logits=True)
        return logits_BTV.cpu()

    def digests(self, names: Iterable[str]) -> dict[str, str]:
        """BLAKE3 of the named tensors as they stand in memory."""
        return digest_tensors(self.objective.model, names)


class LocalEngine(ModelEngine):
    """The model in this process alone."""

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - a transformers model; modified
        groups: Sequence[Group],
        weight_decay: float,
        clip_norm: float,
        *,
        optimizer: str = "adamw",
        master: str = "fp32",
        micro_batch_sequences: int | None = None,
        anchor: Anchor | None = None,
    ) -> None:
        super().__init__(model, micro_batch_sequences, anchor)
        if self.device.type == "cpu" and model.dtype == torch.float32:
            speed_up(self.objective.decoder.module)
        self._clip_norm = clip_norm
        self._optimizer = MasterAdamW(groups, weight_decay, optimizer, master)

    def gradients(self, batch: Batch) -> Loss:
        self.module.train()
        labels = int((batch.labels_BT != IGNORED).sum())
        sums = torch.zeros(2, device=self.device)
        for part in batch.parts(self.micro_batch_sequences):
            sums_of_part = self.module(part)
            (self.objective.weighed(sums_of_part) / labels).backward()
            sums += sums_of_part.detach()
        nats, drift = sums.tolist()
        return Loss(nats, labels, drift)

    def step(self, factor: float) -> float:
        return self._optimizer.step(factor, self._clip_norm)

    def trained(self) -> dict[str, torch.Tensor]:
        """The masters (float32, or the parameters where they are rounded) under the names of the parameters."""
        return {name: master.detach() for name, master in self._optimizer.masters.items()}

    def state(self) -> dict[str, torch.Tensor]:
        return {**self._optimizer.state(), **random_states()}

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._optimizer.load_state(take_random_states(tensors))

    def optimizer_bytes(self) -> StepBytes:
        return self._optimizer.step_bytes()
