"""FP8 linears: the arithmetic by its reference, what is kept for backward, what is refused, and that it learns."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from mansard.errors import BadInput
from mansard.models.freeze import compare, digest_tensors, freeze_except
from mansard.training.frozen_linear import (
    FP8,
    FrozenLinear,
    TrainedLinear,
    quantize_rows,
    require_fp8,
)
from mansard.training.quantized_blocks import quantize_linears

# The first call of an operator imports the compiler, which calls what torch itself deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:::torch")

FP8_STEP = 2**-4
"""Largest relative error of rounding to three bits of mantissa."""


def linear(inputs: int = 64, outputs: int = 48, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=False).to(dtype)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    with torch.no_grad():
        return float((found.float() - exact.float()).norm() / exact.float().norm())


@given(st.integers(0, 1000), st.floats(1e-6, 1e6))
def test_a_row_comes_back_within_the_step_of_fp8(seed: int, size: float) -> None:
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(seed)) * size
    values, scales = quantize_rows(x)
    largest = x.abs().amax(-1, keepdim=True)
    # Below FP8's smallest normal number (2^-6 of 448) steps are even.
    allowed = (x.abs() * FP8_STEP).maximum(largest / 448 * 2**-10)
    assert ((values.float() * scales - x).abs() <= allowed * 1.0001).all()
    assert values.dtype == FP8 and scales.shape == (5, 1)


def test_a_row_of_zeros_stays_zeros() -> None:
    values, scales = quantize_rows(torch.zeros(2, 16))
    assert not (values.float() * scales).any() and scales.isfinite().all()


@pytest.mark.parametrize("kind", [FrozenLinear, TrainedLinear])
def test_output_and_input_gradient_are_those_of_the_plain_linear_within_fp8(kind: Any) -> None:
    plain = linear(256, 128, torch.float32)
    x = torch.randn(3, 10, 256, requires_grad=True)
    again = x.detach().clone().requires_grad_()
    exact, found = plain(x), kind(plain)(again)
    gradient = torch.randn_like(exact)
    exact.backward(gradient)
    found.backward(gradient)
    assert x.grad is not None and again.grad is not None
    assert 0.0 < error(found, exact) < 0.06
    assert 0.0 < error(again.grad, x.grad) < 0.06


def test_the_input_gradient_uses_the_weight_that_the_forward_pass_used() -> None:
    one = FrozenLinear(linear(32, 16, torch.float32))
    weight = one.weight_fp8.float() * one.weight_scale
    # A gradient that scales to whole FP8 values is multiplied without error.
    x = torch.zeros(1, 32, requires_grad=True)
    gradient = torch.zeros(1, 16)
    gradient[0, 3] = 2.0
    one(x).backward(gradient)
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], 2.0 * weight[3], rtol=1e-6, atol=0.0)


def kept_by(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return kept


def test_a_frozen_linear_keeps_nothing_of_its_input() -> None:
    frozen, x = FrozenLinear(linear()), torch.randn(7, 64, requires_grad=True).bfloat16()
    own = {frozen.weight_fp8.data_ptr(), frozen.weight_scale.data_ptr()}
    assert {t.data_ptr() for t in kept_by(frozen, x)} == own
    assert x.data_ptr() in {t.data_ptr() for t in kept_by(TrainedLinear(linear()), x)}


def test_the_weight_gradient_of_a_trained_linear_is_exact() -> None:
    plain = linear(dtype=torch.float32)
    x, gradient = torch.randn(9, 64), torch.randn(9, 48)
    TrainedLinear(plain)(x).backward(gradient)
    assert plain.weight.grad is not None
    torch.testing.assert_close(plain.weight.grad, gradient.t() @ x)


def test_a_trained_weight_is_quantized_again_when_it_has_moved() -> None:
    plain = linear(dtype=torch.float32)
    one, x = TrainedLinear(plain), torch.randn(2, 64)
    before = one(x)
    with torch.no_grad():
        plain.weight.mul_(2.0)
    torch.testing.assert_close(one(x), 2.0 * before)


def test_frozen_linears_are_replaced_and_their_bytes_are_watched() -> None:
    blocks = nn.ModuleList([nn.ModuleDict({"a": linear(), "odd": linear(10, 16)}), nn.ModuleDict({"b": linear()})])
    freeze_except(blocks, {"1.b.weight"})
    quantize_linears(blocks, new_blocks_too=True)
    assert [type(m) for m in (blocks[0]["a"], blocks[0]["odd"], blocks[1]["b"])] == [
        FrozenLinear,
        nn.Linear,
        TrainedLinear,
    ]
    frozen = freeze_except(blocks, {"1.b.weight"})
    assert frozen == ["0.a.weight_fp8", "0.a.weight_scale", "0.odd.weight"]
    before = digest_tensors(blocks, frozen)
    blocks[0]["a"].weight_fp8.view(torch.uint8)[3, 5] ^= 1
    assert compare(before, digest_tensors(blocks, frozen)) == ["0.a.weight_fp8"]


def test_a_device_without_fp8_is_refused_with_the_reason() -> None:
    with pytest.raises(BadInput, match=r"train\.frozen: fp8 needs FP8 matrix units, and this is a CPU") as caught:
        require_fp8(torch.device("cpu"))
    assert "use frozen: bf16" in str(caught.value)


def losses_of(is_fp8: bool) -> list[float]:
    from mansard.demo.base import untrained_model
    from mansard.training.data import as_batch
    from mansard.training.engines import LocalEngine
    from mansard.training.optimizer import Group
    from mansard.training.packing import pack

    shape = {"vocabulary": 48, "hidden": 32, "intermediate": 64, "blocks": 3, "heads": 2, "max_tokens": 64}
    model = untrained_model(shape, 0).to(torch.bfloat16)
    names = {name for name, _ in model.named_parameters() if name.startswith("model.layers.1.")}
    freeze_except(model, names)
    if is_fp8:
        quantize_linears(model.get_decoder().layers, new_blocks_too=True)
    group = Group("new_blocks", 1e-2, {n: p for n, p in model.named_parameters() if n in names})
    engine = LocalEngine(model, [group], 0.0, 1.0)
    batch = as_batch(*pack([[2 + (i * j) % 40 for j in range(1, 60)] for i in range(1, 9)], 64, 0))
    losses = []
    for _ in range(40):
        losses.append(engine.gradients(batch).mean)
        engine.step(1.0)
    return losses


@pytest.mark.slow
def test_a_storey_learns_in_fp8_what_it_learns_in_bf16() -> None:
    plain, eight = losses_of(is_fp8=False), losses_of(is_fp8=True)
    assert plain[-1] < 0.9 * plain[0]
    assert eight[-1] == pytest.approx(plain[-1], rel=0.02)
