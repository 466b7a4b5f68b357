"""How states are kept: bf16, or 8 bits with a scale per token and the first token of every sequence in bf16.

A scale per tensor is not offered: the first token's norm is about a hundred times the others', so one scale for all
would round them to nothing. Legend: N tokens, D width, S sequences.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from mansard.errors import BadInput

Scheme = Literal["bf16", "fp8", "int8"]
SCHEMES: tuple[Scheme, ...] = ("bf16", "fp8", "int8")
_KINDS = {"fp8": (torch.float8_e4m3fn, 448.0), "int8": (torch.int8, 127.0)}
"""The stored type and the largest value that it holds."""


@dataclass(frozen=True, slots=True)
class Coded:
    """States [N, D] of whole sequences in a row; `scales_N` (float32) and `first_SD` (bf16) go with 8 bits."""

    states_ND: torch.Tensor
    scales_N: torch.Tensor | None = None
    first_SD: torch.Tensor | None = None


def check_scheme(scheme: str) -> None:
    """BadInput for anything but the three, with the reason where a scale per tensor is asked for."""
    if "tensor" in scheme:
        raise BadInput(
            f"capture.scheme {scheme!r}: one scale for a whole tensor destroys the states (the first token's norm is "
            "about a hundred times the others'); fp8 and int8 here keep a scale per token"
        )
    if scheme not in SCHEMES:
        raise BadInput(f"capture.scheme {scheme!r}: one of {', '.join(SCHEMES)} is expected")


def bytes_per_token(scheme: Scheme, width: int, tokens_per_sequence: float) -> float:
    """What a token takes on disk, scales and first tokens counted in."""
    if scheme == "bf16":
        return 2.0 * width
    return width + 4 + 2.0 * width / tokens_per_sequence


def encode(states_ND: torch.Tensor, starts: list[int], scheme: Scheme) -> Coded:
    """`starts` are the rows at which sequences begin. BadInput where a state is not finite."""
    if not bool(torch.isfinite(states_ND).all()):
        raise BadInput("the states hold values that are not finite; look at the node's base")
    if scheme == "bf16":
        return Coded(states_ND.to(torch.bfloat16))
    kind, largest = _KINDS[scheme]
    values = states_ND.float()
    scales_N = values.abs().amax(-1).clamp(min=1e-12) / largest
    scaled = values / scales_N[:, None]
    codes = scaled.round().to(kind) if kind == torch.int8 else scaled.to(kind)
    return Coded(codes, scales_N, states_ND[starts].to(torch.bfloat16))


def decode(coded: Coded, first_rows: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """States [N, D]; `first_rows` (int64) are the rows that `first_SD` replaces, in its order."""
    if coded.scales_N is None:
        return coded.states_ND.to(dtype)
    values = (coded.states_ND.float() * coded.scales_N[:, None]).to(dtype)
    if coded.first_SD is not None:
        values.index_copy_(0, first_rows, coded.first_SD.to(dtype))
    return values


def pinned(coded: Coded) -> Coded:
    """The same in pinned host memory, from which a GPU copies beside its work."""
    return Coded(*(None if t is None else t.pin_memory() for t in (coded.states_ND, coded.scales_N, coded.first_SD)))


def moved(coded: Coded, device: torch.device) -> Coded:
    """The same on `device`."""
    kept = (coded.states_ND, coded.scales_N, coded.first_SD)
    return Coded(*(None if t is None else t.to(device, non_blocking=True) for t in kept))
