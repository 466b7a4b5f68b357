"""What trains and at which rate: parameter groups, fp32 masters, the schedule.

A parameter held in a shorter type than float32 gets a float32 master that the optimizer moves; the parameter is the
master, rounded (plain bf16 AdamW keeps 11 % of the movement at a rate of 1e-5, facts.md). Matrices take weight decay,
vectors do not.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters, by their names in the model, that share a peak rate."""

    name: str
    peak_rate: float
    parameters: Mapping[str, nn.Parameter]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Linear warm-up to 1, then a cosine to 0 at `steps`."""

    steps: int
    warmup_steps: int

    def factor(self, step: int) -> float:
        """The share of the peak rate at the 0-based `step`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
        return 0.5 * (1.0 + math.cos(math.pi * progress))


class MasterAdamW:
    """AdamW (Loshchilov and Hutter, 2019; torch's) on float32 masters."""

    def __init__(self, groups: Sequence[Group], weight_decay: float) -> None:
        self.groups = tuple(groups)
        self._parameters = {name: p for g in groups for name, p in g.parameters.items()}
        self.masters: dict[str, torch.Tensor] = {
            name: p if p.dtype == torch.float32 else p.detach().to(torch.float32, copy=True)
            for name, p in self._parameters.items()
        }
        self._optimizer = torch.optim.AdamW(
            [
                {"params": chosen, "lr": group.peak_rate, "peak_rate": group.peak_rate, "weight_decay": decay}
                for group in groups
                for chosen, decay in self._by_decay(group, weight_decay)
                if chosen
            ],
            betas=(0.9, 0.95),
            foreach=True,
        )

    def _by_decay(self, group: Group, weight_decay: float) -> list[tuple[list[torch.Tensor], float]]:
        masters = [self.masters[name] for name in group.parameters]
        return [([m for m in masters if m.ndim >= 2], weight_decay), ([m for m in masters if m.ndim < 2], 0.0)]

    def step(self, factor: float, clip_norm: float) -> float:
        """Clip the gradients' total norm, move the masters at `factor` of their peak rates, round them down into the
        parameters, drop the gradients. Returns the norm before clipping; where it is not finite nothing moves."""
        for name, parameter in self._parameters.items():
            if self.masters[name] is not parameter and parameter.grad is not None:
                self.masters[name].grad = parameter.grad.to(torch.float32)
                parameter.grad = None
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.masters.values()), clip_norm))
        if math.isfinite(norm):
            for group in self._optimizer.param_groups:
                group["lr"] = group["peak_rate"] * factor
            self._optimizer.step()
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    if self.masters[name] is not parameter:
                        parameter.copy_(self.masters[name])
        self._optimizer.zero_grad()
        return norm

    def state(self) -> dict[str, torch.Tensor]:
        """Masters and moments under KIND/NAME; the moments are missing before the first step."""
        tensors = {f"master/{name}": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            for kind, value in self._optimizer.state.get(master, {}).items():
                tensors[f"{kind}/{name}"] = value
        return tensors

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state` gave; KeyError where a tensor is missing."""
        kinds = {key.split("/", 1)[0] for key in tensors} - {"master"}
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(tensors[f"master/{name}"])
                self._parameters[name].copy_(master)
                self._optimizer.state[master] = {
                    # torch keeps the step count on the CPU.
                    kind: tensors[f"{kind}/{name}"].to("cpu" if kind == "step" else master.device, copy=True)
                    for kind in kinds
                }
