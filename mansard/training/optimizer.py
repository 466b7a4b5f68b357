"""What trains and at which rate: parameter groups, fp32 masters, the schedule.

A parameter held in a shorter type than float32 gets a float32 master that the optimizer moves; the parameter is the
master, rounded (plain bf16 AdamW keeps 11 % of the movement at a rate of 1e-5, measured 2026-11). With `master:
stochastic_rounding` there are no masters, and small steps arrive in the mean. Matrices take weight decay, vectors do
not.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mansard.training.adamw import RoundedAdamW, make_optimizer, moment_bytes, set_rates, state_of, state_tensors


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


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Of a step: moments not yet there, what comes and goes beside the gradients, all that is read and written."""

    moments: int
    passing: int
    moved: int


@dataclass(frozen=True, slots=True)
class HeldBytes:
    """Beside parameters and gradients: masters and moments, from the first step on; `passing` while a step lasts."""

    masters: int
    moments: int
    passing: int


def torch_groups(
    groups: Sequence[Group], tensors: Mapping[str, torch.Tensor], weight_decay: float
) -> list[dict[str, Any]]:
    """torch's parameter groups of what is moved for each parameter: matrices take weight decay, vectors do not."""
    made = []
    for group in groups:
        moved = [tensors[name] for name in group.parameters]
        matrices, vectors = [t for t in moved if t.ndim >= 2], [t for t in moved if t.ndim < 2]
        for members, decay in ((matrices, weight_decay), (vectors, 0.0)):
            if members:
                rates = {"lr": group.peak_rate, "peak_rate": group.peak_rate, "weight_decay": decay}
                made.append({"params": members, **rates})
    return made


class MasterAdamW:
    """AdamW of a kind (`mansard.training.adamw`) on float32 masters, or on bf16 parameters rounded stochastically."""

    def __init__(self, groups: Sequence[Group], weight_decay: float, kind: str = "adamw", master: str = "fp32") -> None:
        self.groups = tuple(groups)
        self._parameters = {name: p for g in groups for name, p in g.parameters.items()}
        is_rounded = master == "stochastic_rounding"
        self.masters: dict[str, torch.Tensor] = {
            name: p if is_rounded or p.dtype == torch.float32 else p.detach().to(torch.float32, copy=True)
            for name, p in self._parameters.items()
        }
        self._optimizer = make_optimizer(torch_groups(groups, self.masters, weight_decay), kind, is_rounded)
        self._widened = [name for name, p in self._parameters.items() if self.masters[name] is not p]
        self._rounded = [self._parameters[name] for name in self._widened]

    def step_bytes(self) -> StepBytes:
        """What a step will take and move; an estimate for `passing` and `moved`."""
        masters = list(self.masters.values())
        largest = max(m.numel() for m in masters)
        held = self.held_bytes()
        weights = sum(p.nbytes + m.nbytes for p, m in zip(self._parameters.values(), masters, strict=True))
        moved = 2 * (held.moments + weights + held.masters)
        return StepBytes(0 if self._optimizer.state else held.moments, held.masters + 16 * largest, moved)

    def held_bytes(self) -> HeldBytes:
        """What it takes for itself. One that rounds widens a tensor at a time; torchao's works in place."""
        masters = sum(self.masters[name].nbytes for name in self._widened)  # float32, as the widened gradients are
        moments = sum(moment_bytes(self._optimizer, m) for m in self.masters.values())
        is_widening = isinstance(self._optimizer, RoundedAdamW)
        passing = 16 * max(m.numel() for m in self.masters.values()) if is_widening else 0
        return HeldBytes(masters, moments, masters + passing)

    def step(self, factor: float, clip_norm: float) -> float:
        """Clip the gradients' total norm, move the masters at `factor` of their peak rates, round them down into the
        parameters, drop the gradients. Returns the norm before clipping; where it is not finite nothing moves."""
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        norm = _clip(gradients, clip_norm)
        if math.isfinite(norm):
            self._widen_gradients()
            set_rates(self._optimizer, factor)
            self._optimizer.step()
            if self._rounded:
                with torch.no_grad():
                    torch._foreach_copy_(self._rounded, [self.masters[name] for name in self._widened])
        self._optimizer.zero_grad()
        for parameter in self._parameters.values():
            parameter.grad = None
        return norm

    def _widen_gradients(self) -> None:
        """The masters' gradients; the parameters' own are dropped."""
        given = [(self.masters[n], self._parameters[n]) for n in self._widened if self._parameters[n].grad is not None]
        if given:
            wide = [torch.empty_like(master) for master, _ in given]
            torch._foreach_copy_(wide, [parameter.grad for _, parameter in given])
            for (master, parameter), gradient in zip(given, wide, strict=True):
                master.grad, parameter.grad = gradient, None

    def state(self) -> dict[str, torch.Tensor]:
        """Masters and moments under KIND/NAME; the moments are missing before the first step."""
        tensors = {f"master/{name}": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            for kind, value in state_tensors(self._optimizer.state.get(master, {})):
                tensors[f"{kind}/{name}"] = value
        return tensors

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state` gave; KeyError where a tensor is missing."""
        told: dict[str, dict[str, torch.Tensor]] = {name: {} for name in self.masters}
        for key, value in tensors.items():
            kind, name = key.split("/", 1)
            told[name][kind] = value
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(told[name].pop("master"))
                if self._parameters[name] is not master:
                    self._parameters[name].copy_(master)
                if told[name]:
                    self._optimizer.state[master] = state_of(self._optimizer, master, told[name])


def _clip(gradients: Sequence[torch.Tensor], clip_norm: float) -> float:
    """Scale the gradients down to a total norm of `clip_norm`; returns the norm before, summed in float32."""
    if not gradients:
        return 0.0
    norms = torch._foreach_norm(list(gradients), 2.0, dtype=torch.float32)
    norm = float(torch.linalg.vector_norm(torch.stack(norms)))
    if math.isfinite(norm) and norm > clip_norm:
        torch._foreach_mul_(list(gradients), clip_norm / (norm + 1e-6))
    return norm
