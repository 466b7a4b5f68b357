"""Triton kernels of a gated MLP: a row stays in registers between its largest value and its quantization.

What the compiler makes of the same arithmetic reads a row twice and raises each exponential twice. `frozen_mlp` has the
reference in torch, and imports this only where a GPU computes. A row is a power of two and a masked rest (LOW and HIGH
lanes), because 11,008 values in 16,384 lanes would need registers for one row a processor instead of two.
"""

import torch
import triton
import triton.language as tl

FORWARD = {"num_warps": 16}
BACKWARD = {"num_warps": 8, "maxnreg": 128}
"""So that two rows are in flight on one processor. 16,384 rows of 11,008 on an H200 (2026-11-26): 0.23 ms forward and
0.45 ms backward; 0.50 ms with twice the warps and half the registers each, 0.59 ms without a limit."""
BACKWARD_WIDE = {"num_warps": 16}
"""For rows of more lanes than LANES_OF_TWO, of which two do not fit (not measured)."""
LANES_OF_TWO = 12288
LARGEST = tl.constexpr(448.0)
SMALLEST_ROW = tl.constexpr(1e-12)


def gated_rows(gate_MI: torch.Tensor, up_MI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) * up by rows in FP8: (values [M, I], scales [M, 1])."""
    values_MI, scale_M1 = _empty_rows(gate_MI)
    _gated_rows[(len(gate_MI),)](gate_MI, up_MI, values_MI, scale_M1, **_lanes(gate_MI.shape[1]), **FORWARD)
    return values_MI, scale_M1


def gradient_rows(
    grad_MI: torch.Tensor,
    gate_MI: torch.Tensor,
    up_MI: torch.Tensor,
    gate_scale_I1: torch.Tensor,
    up_scale_I1: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of gate and up, each times its scale a column, by rows in FP8: values and scales of both."""
    to_gate, to_up = _empty_rows(gate_MI), _empty_rows(gate_MI)
    lanes = _lanes(gate_MI.shape[1])
    launch = BACKWARD if lanes["LOW"] + lanes["HIGH"] <= LANES_OF_TWO else BACKWARD_WIDE
    _gradient_rows[(len(gate_MI),)](
        grad_MI, gate_MI, up_MI, gate_scale_I1, up_scale_I1, *to_gate, *to_up, **lanes, **launch
    )
    return *to_gate, *to_up


def _empty_rows(like_MI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale_M1 = torch.empty(like_MI.shape[0], 1, dtype=torch.float32, device=like_MI.device)
    return torch.empty_like(like_MI, dtype=torch.float8_e4m3fn), scale_M1


def _lanes(width: int) -> dict[str, int]:
    low = 1 << (width - 1).bit_length() - 1
    return {"WIDTH": width, "LOW": low, "HIGH": 1 << (width - low - 1).bit_length()}


@triton.jit
def _gated(gate_ptr, up_ptr, row, column, WIDTH: tl.constexpr):
    at, inside = row * WIDTH + column, column < WIDTH
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _largest(low, high):
    largest = tl.maximum(tl.max(tl.abs(low), axis=0), tl.max(tl.abs(high), axis=0))
    return tl.maximum(largest, SMALLEST_ROW)


@triton.jit
def _store(values_ptr, values, largest, row, column, WIDTH: tl.constexpr):
    quantized = (values * (LARGEST / largest)).to(tl.float8e4nv)
    tl.store(values_ptr + row * WIDTH + column, quantized, mask=column < WIDTH)


@triton.jit
def _gated_rows(gate_ptr, up_ptr, values_ptr, scale_ptr, WIDTH: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    low, high = tl.arange(0, LOW), LOW + tl.arange(0, HIGH)
    gated_low, gated_high = _gated(gate_ptr, up_ptr, row, low, WIDTH), _gated(gate_ptr, up_ptr, row, high, WIDTH)
    largest = _largest(gated_low, gated_high)
    tl.store(scale_ptr + row, largest / LARGEST)
    _store(values_ptr, gated_low, largest, row, low, WIDTH)
    _store(values_ptr, gated_high, largest, row, high, WIDTH)


@triton.jit
def _gradients(grad_ptr, gate_ptr, up_ptr, gate_scale_ptr, up_scale_ptr, row, column, WIDTH: tl.constexpr):
    at, inside = row * WIDTH + column, column < WIDTH
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * share
    to_gate = grad * up * (share + silu * (1.0 - share)) * tl.load(gate_scale_ptr + column, mask=inside, other=0.0)
    return to_gate, grad * silu * tl.load(up_scale_ptr + column, mask=inside, other=0.0)


@triton.jit
def _gradient_rows(
    grad_ptr, gate_ptr, up_ptr, gate_scale_ptr, up_scale_ptr,
    to_gate_ptr, to_gate_scale_ptr, to_up_ptr, to_up_scale_ptr,
    WIDTH: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    low, high = tl.arange(0, LOW), LOW + tl.arange(0, HIGH)
    gate_low, up_low = _gradients(grad_ptr, gate_ptr, up_ptr, gate_scale_ptr, up_scale_ptr, row, low, WIDTH)
    gate_high, up_high = _gradients(grad_ptr, gate_ptr, up_ptr, gate_scale_ptr, up_scale_ptr, row, high, WIDTH)
    gate_largest, up_largest = _largest(gate_low, gate_high), _largest(up_low, up_high)
    tl.store(to_gate_scale_ptr + row, gate_largest / LARGEST)
    tl.store(to_up_scale_ptr + row, up_largest / LARGEST)
    _store(to_gate_ptr, gate_low, gate_largest, row, low, WIDTH)
    _store(to_gate_ptr, gate_high, gate_largest, row, high, WIDTH)
    _store(to_up_ptr, up_low, up_largest, row, low, WIDTH)
    _store(to_up_ptr, up_high, up_largest, row, high, WIDTH)
