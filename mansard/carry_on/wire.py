"""How states are kept: bf16, or 8 bits with a scale per token and the first token of every sequence in bf16.

A scale per tensor is not offered: the first token's norm is about a hundred times the others', so one scale for all
would round them to nothing. Where a token has several states (taps, other bases), each has a scale of its own.
Legend: N tokens, D width (of all states of a token), S sequences, K states of a token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from mansard.errors import BadInput

Scheme = Literal["bf16", "fp8", "int8"]
SCHEMES: tuple[Scheme, ...] = ("bf16", "fp8", "int8")
_KINDS = {"fp8": (torch.float8_e4m3fn, 448.0), "int8": (torch.int8, 127.0)}
"""The stored type and the largest value that it holds."""
BLOCK_VALUES = 262_144
"""1 MB in float32. [4096, 4096] in bf16 to fp8 on one core of a Xeon (2026-11-26): 164 ms in whole passes, see
bench_capture for what it is now."""


@dataclass(frozen=True, slots=True)
class Coded:
    """States [N, D] of whole sequences in a row; `scales_N` (float32; [N, K] where there are several `widths`) and
    `first_SD` (bf16) go with 8 bits."""

    states_ND: torch.Tensor
    scales_N: torch.Tensor | None = None
    first_SD: torch.Tensor | None = None
    widths: tuple[int, ...] = ()


def check_scheme(scheme: str) -> None:
    """BadInput for anything but the three, with the reason where a scale per tensor is asked for."""
    if "tensor" in scheme:
        raise BadInput(
            f"capture.scheme {scheme!r}: one scale for a whole tensor destroys the states (the first token's norm is "
            "about a hundred times the others'); fp8 and int8 here keep a scale per token"
        )
    if scheme not in SCHEMES:
        raise BadInput(f"capture.scheme {scheme!r}: one of {', '.join(SCHEMES)} is expected")


def bytes_per_token(scheme: Scheme, width: int, tokens_per_sequence: float, scales: int = 1) -> float:
    """What a token takes on disk, scales and first tokens counted in; `width` is of all its states."""
    if scheme == "bf16":
        return 2.0 * width
    return width + 4 * scales + 2.0 * width / tokens_per_sequence


def encode(states_ND: torch.Tensor, starts: list[int], scheme: Scheme, states: int = 1) -> Coded:
    """`starts` are the rows at which sequences begin; a token has so many `states` of one width. BadInput where a state
    is not finite."""
    if scheme == "bf16":
        _check_finite(states_ND.abs().amax())
        return Coded(states_ND.to(torch.bfloat16))
    codes_ND, scales_NK = _in_8_bits(states_ND, scheme, states)
    first_SD = states_ND[starts].to(torch.bfloat16)
    if states == 1:
        return Coded(codes_ND, scales_NK[:, 0], first_SD)
    return Coded(codes_ND, scales_NK, first_SD, (states_ND.shape[-1] // states,) * states)


def _in_8_bits(states_ND: torch.Tensor, scheme: Scheme, states: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, D] and scales [N, K], a few rows at a time: what is between them stays in a core's cache."""
    kind, largest = _KINDS[scheme]
    rows = max(BLOCK_VALUES // states_ND.shape[-1], 1)
    codes_ND = torch.empty_like(states_ND, dtype=kind)
    scales_NK = states_ND.new_empty(len(states_ND), states, dtype=torch.float32)
    room = torch.empty_like(states_ND[:rows], dtype=torch.float32)
    for codes, scales, block in zip(codes_ND.split(rows), scales_NK.split(rows), states_ND.split(rows), strict=True):
        largest_nK = block.unflatten(-1, (states, -1)).abs().amax(-1)
        _check_finite(largest_nK)
        torch.div(largest_nK.float().clamp_(min=1e-12), largest, out=scales)
        values = room[: len(block)].copy_(block)
        values.unflatten(-1, (states, -1)).div_(scales[..., None])
        codes.copy_(values.round_() if kind == torch.int8 else values)
    return codes_ND, scales_NK


def _check_finite(largest: torch.Tensor) -> None:
    """Of the largest magnitudes: a value that is not finite is one."""
    if not bool(torch.isfinite(largest).all()):
        raise BadInput("the states hold values that are not finite; look at the node's base")


def side_by_side(parts: Sequence[Coded]) -> Coded:
    """One row a token of several bases' states of the same tokens; BadInput where they are kept in different ways."""
    kinds = {part.states_ND.dtype for part in parts}
    if len(kinds) > 1:
        raise BadInput("the bases' states are kept in different schemes; capture all with one capture.scheme")
    states_ND = torch.cat([part.states_ND.view(torch.uint8) for part in parts], dim=-1).view(kinds.pop())
    scales = [part.scales_N.view(len(states_ND), -1) for part in parts if part.scales_N is not None]
    firsts = [part.first_SD for part in parts if part.first_SD is not None]
    if not scales:
        return Coded(states_ND)
    widths = tuple(width for part in parts for width in part.widths or part.states_ND.shape[-1:])
    return Coded(states_ND, torch.cat(scales, dim=-1), torch.cat(firsts, dim=-1), widths)


def decode(coded: Coded, first_rows: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """States [N, D]; `first_rows` (int64) are the rows that `first_SD` replaces, in its order."""
    if coded.scales_N is None:
        return coded.states_ND.to(dtype)
    return decode_into(torch.empty_like(coded.states_ND, dtype=dtype), coded, first_rows)


def decode_into(into_ND: torch.Tensor, coded: Coded, first_rows: torch.Tensor) -> torch.Tensor:
    """The same in memory that is there, and no more: 8-bit codes are exact in bf16, products are rounded once."""
    into_ND.copy_(coded.states_ND, non_blocking=True)
    if coded.scales_N is not None:
        widths = coded.widths or into_ND.shape[-1:]
        scales = coded.scales_N.view(len(into_ND), -1).split(1, dim=-1)
        for part, scale in zip(into_ND.split(widths, dim=-1), scales, strict=True):
            part.mul_(scale)
    if coded.first_SD is not None:
        into_ND.index_copy_(0, first_rows, coded.first_SD.to(into_ND.dtype))
    return into_ND


def pinned(coded: Coded) -> Coded:
    """The same in pinned host memory, from which a GPU copies beside its work."""
    return _each(coded, torch.Tensor.pin_memory)


def moved(coded: Coded, device: torch.device) -> Coded:
    """The same on `device`."""
    return _each(coded, lambda tensor: tensor.to(device, non_blocking=True))


def _each(coded: Coded, take: Callable[[torch.Tensor], torch.Tensor]) -> Coded:
    scales_N = None if coded.scales_N is None else take(coded.scales_N)
    first_SD = None if coded.first_SD is None else take(coded.first_SD)
    return Coded(take(coded.states_ND), scales_N, first_SD, coded.widths)
