"""A frozen gated MLP as one operator: its arithmetic beside separate linears, what is kept, and what is left alone."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import Gemma2Config, LlamaConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP
from transformers.models.llama.modeling_llama import LlamaMLP

from mansard.training.frozen_mlp import FrozenMLP, gradient_rows
from mansard.training.quantized_blocks import quantize_linears

# The first call of an operator imports the compiler, which calls what torch itself deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:::torch")


def mlp(**others: Any) -> LlamaMLP:
    torch.manual_seed(0)
    return LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=96, **others)).requires_grad_(False)


def quantized(one: nn.Module) -> Any:
    blocks = nn.ModuleDict({"mlp": one})
    quantize_linears(blocks, new_blocks_too=True)
    return blocks["mlp"]


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).detach().norm() / exact.detach().norm())


def passed(one: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, gradient of `x`) for a gradient of the output that varies."""
    given = x.clone().requires_grad_()
    output = one(given)
    output.backward(torch.linspace(-1.0, 1.0, output.numel()).view_as(output))
    assert given.grad is not None
    return output, given.grad


def test_output_and_input_gradient_are_those_of_separate_fp8_linears() -> None:
    x = torch.randn(2, 9, 64)
    linears = mlp()
    for name in ("gate_proj", "up_proj", "down_proj"):
        setattr(linears, name, quantized(nn.ModuleDict({name: getattr(linears, name)}))[name])
    whole = quantized(mlp())
    assert type(whole) is FrozenMLP
    for found, separate, exact in zip(passed(whole, x), passed(linears, x), passed(mlp(), x), strict=True):
        # Another order of products moves a value here and there by one step of FP8.
        assert error(found, separate) < 0.005
        assert 0.0 < error(found, exact) < 0.08


def test_the_gradients_of_gate_and_up_carry_their_scales() -> None:
    gate, up, grad = (torch.randn(5, 32, dtype=torch.float64, requires_grad=True) for _ in range(3))
    scales = [torch.rand(32, 1) + 0.5 for _ in range(2)]
    (nn.functional.silu(gate) * up).backward(grad.detach())
    found = gradient_rows(*(t.detach().float() for t in (grad, gate, up)), *scales)
    for values, scale, exact, column in zip(found[::2], found[1::2], (gate.grad, up.grad), scales, strict=True):
        assert exact is not None
        assert error(values.float() * scale, exact.float() * column.t()) < 0.04


def test_it_keeps_gate_and_up_and_nothing_of_the_input() -> None:
    one, x = quantized(mlp()), torch.randn(7, 64, requires_grad=True)
    kept: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        one(x)
    own = {buffer.data_ptr() for buffer in one.buffers()}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in own] == [(7, 96), (7, 96)]


def test_only_a_frozen_mlp_without_bias_and_with_silu_is_taken_whole() -> None:
    gelu = Gemma2MLP(Gemma2Config(hidden_size=64, intermediate_size=96)).requires_grad_(False)
    trained = mlp()
    trained.up_proj.weight.requires_grad_(True)
    narrow = LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=90)).requires_grad_(False)
    for one in (gelu, trained, narrow, mlp(mlp_bias=True), mlp(hidden_act="relu")):
        assert type(quantized(one)) is type(one)


def test_the_buffers_keep_their_names() -> None:
    parts = ("weight_fp8", "weight_scale")
    linears = ("gate_proj", "up_proj", "down_proj")
    assert set(quantized(mlp()).state_dict()) == {f"{name}.{part}" for name in linears for part in parts}
