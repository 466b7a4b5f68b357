"""AdamW (Loshchilov and Hutter, 2019) in its kinds: torch's, torchao's with 8-bit moments, and one that rounds bf16
parameters stochastically, so that no float32 master is held.

All compute in float32. The rounding draws from torch's generator of the tensor's device, which checkpoints hold.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.optim.adamw import adamw

BETAS = (0.9, 0.95)
EPSILON = 1e-8
MOMENT_BLOCK = 256
"""Values that share a scale in torchao's 8-bit moments (its default)."""


def stochastic_round(x: torch.Tensor) -> torch.Tensor:
    """float32 -> bfloat16: up or down with the probability that makes the mean `x`; what bf16 holds stays as it is."""
    bits = x.contiguous().view(torch.int32)
    draw = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=x.device)
    # A bf16 is the upper half of a float32's bits; adding below the cut carries over with that probability.
    return ((bits + draw) & -0x10000).view(torch.float32).to(torch.bfloat16)


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW on bf16 parameters: each is widened, moved and rounded stochastically, one at a time; float32 moments."""

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})

    def step(self) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._move(parameter, group["lr"], group["weight_decay"])

    def _move(self, parameter: torch.Tensor, rate: float, decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        wide = parameter.detach().float()
        adamw(
            [wide], [parameter.grad.float()], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
            foreach=False, fused=parameter.is_cuda, amsgrad=False, beta1=BETAS[0], beta2=BETAS[1], lr=rate,
            weight_decay=decay, eps=EPSILON, maximize=False,
        )  # fmt: skip
        parameter.copy_(stochastic_round(wide))


def make_optimizer(groups: list[dict[str, Any]], kind: str, is_rounded: bool) -> torch.optim.Optimizer:
    """The optimizer of `kind` (`adamw`, `adamw_8bit`) over torch's parameter groups."""
    if kind == "adamw_8bit":
        from torchao.optim import AdamW8bit

        return AdamW8bit(groups, betas=BETAS, eps=EPSILON, block_size=MOMENT_BLOCK, bf16_stochastic_round=is_rounded)
    if is_rounded:
        return RoundedAdamW(groups)
    return torch.optim.AdamW(groups, betas=BETAS, eps=EPSILON, fused=True)


def moment_bytes(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> int:
    """What `optimizer` keeps of `parameter` from step to step."""
    count: int = parameter.numel()
    if not isinstance(optimizer, torch.optim.AdamW | RoundedAdamW) and count >= 4096 and count % MOMENT_BLOCK == 0:
        return 2 * (count + 4 * count // MOMENT_BLOCK)
    return 2 * count * (4 if isinstance(optimizer, RoundedAdamW) else int(parameter.element_size()))


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Each group's rate is `factor` of its `peak_rate` (torchao holds rates in tensors)."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(group["peak_rate"] * factor)
        else:
            group["lr"] = group["peak_rate"] * factor


def state_tensors(state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """One parameter's state as plain tensors: an 8-bit moment is its codes and their scales."""
    for kind, value in state.items():
        if hasattr(value, "codes"):
            yield f"{kind}.codes", value.codes
            yield f"{kind}.scale", value.scale
        else:
            yield kind, value


def state_of(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What `state_tensors` told, as `optimizer`'s state for `parameter`, on its device."""
    # torchao counts steps on the CPU.
    counts_on_cpu = isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    state = {}
    for kind, value in tensors.items():
        moment, _, part = kind.partition(".")
        if part == "codes":
            from torchao.optim.subclass_8bit import OptimState8bit

            made = OptimState8bit.zeros(
                value.shape, moment == "exp_avg", MOMENT_BLOCK, parameter.device, dtype=parameter.dtype
            )
            made.codes.copy_(value)
            made.scale.copy_(tensors[f"{moment}.scale"])
            state[moment] = made
        elif not part:
            state[kind] = value.to("cpu" if kind == "step" and counts_on_cpu else parameter.device, copy=True)
    return state
