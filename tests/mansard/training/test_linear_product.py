"""Products in bf16 of linears in float32 (`frozen: bf16`, `new_blocks: bf16`): rounded where it says, else torch's."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from mansard.models.loading import load_model
from mansard.records import SnapshotId
from mansard.specs.training import LearningRates
from mansard.store.store import Store
from mansard.training import linear_product
from mansard.training.blocks import checkpoint_names, train_only
from mansard.training.linear_product import HAS_BF16, Bf16Linear, plain_type, product, shorten, weight_gradient


def gradients(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    x = x.clone().requires_grad_()
    output = module(x)
    output.square().sum().backward()
    assert x.grad is not None
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return output.detach(), x.grad, weight.grad


@pytest.mark.skipif(not HAS_BF16, reason="this CPU has no units for bf16")
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_of_rounded_values_and_all_else_is_in_float32(bias: bool) -> None:
    torch.manual_seed(0)
    made = nn.Linear(48, 80, bias=bias)
    x = torch.randn(3, 5, 48)
    output, to_x, to_weight = gradients(Bf16Linear(made), x)
    assert {output.dtype, to_x.dtype, made.weight.dtype} == {torch.float32} and to_weight is not None
    short = linear(x.bfloat16(), made.weight.bfloat16()).float()
    assert torch.equal(output, short if made.bias is None else short + made.bias)
    upstream = (2 * output).bfloat16().flatten(0, 1)
    assert torch.equal(to_x.flatten(0, 1), (upstream @ made.weight.detach().bfloat16()).float())
    assert torch.equal(to_weight, (upstream.t() @ x.flatten(0, 1).bfloat16()).float())
    if made.bias is not None:
        assert made.bias.grad is not None
        torch.testing.assert_close(made.bias.grad, 2 * output.flatten(0, 1).sum(0))


def test_a_base_in_bf16_loses_nothing_of_its_weights() -> None:
    torch.manual_seed(0)
    made = nn.Linear(32, 64, bias=False)
    made.weight.data = made.weight.data.bfloat16().float()
    x = torch.randn(7, 32).bfloat16().float()  # inputs that bf16 holds, too
    found, right = Bf16Linear(made)(x).detach(), made(x).detach()
    assert float((found - right).abs().max()) <= 2**-8 * float(right.abs().max())  # only the output was rounded


def test_what_is_frozen_keeps_no_input() -> None:
    made = nn.Linear(32, 64, bias=False).requires_grad_(False)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        Bf16Linear(made)(torch.randn(9, 32, requires_grad=True))
    assert [tuple(x.shape) for x in kept] == [(64, 32)]


@pytest.mark.parametrize(("frozen", "trained"), [(True, False), (False, True), (True, True), (False, False)])
def test_frozen_and_trained_linears_are_told_apart(frozen: bool, trained: bool) -> None:
    blocks = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))])
    blocks[0].requires_grad_(False)
    names, weights = [n for n, _ in blocks.named_parameters()], [p for _, p in blocks.named_parameters()]
    shorten(blocks, frozen, trained)
    assert [type(blocks[0]) is Bf16Linear, type(blocks[1][0]) is Bf16Linear] == [frozen, trained]
    assert [n for n, _ in blocks.named_parameters()] == names
    assert all(a is b for a, b in zip(weights, blocks.parameters(), strict=True))


def test_linears_of_one_block_take_their_products_in_one_type_or_are_left() -> None:
    block = nn.ModuleDict({n: nn.Linear(4, 4, bias=False) for n in ("a", "b")})
    assert plain_type(block, "a", "b") == torch.float32
    block["a"] = Bf16Linear(block["a"])
    assert plain_type(block, "a") == torch.bfloat16 and plain_type(block, "a", "b") is None
    block["b"] = nn.Linear(4, 4)
    assert plain_type(block, "b") is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_torchs(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x_MK, weight_NK = torch.randn(33, 24).to(dtype), torch.randn(40, 24).to(dtype)
    torch.testing.assert_close(product(x_MK, weight_NK), linear(x_MK, weight_NK))
    torch.testing.assert_close(product(x_MK, weight_NK.clone().t().contiguous().t()), linear(x_MK, weight_NK))


def test_without_units_for_bf16_rounded_values_are_multiplied_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x_MK, weight_NK, grad_MN = (torch.randn(*shape).bfloat16() for shape in ((33, 24), (40, 24), (33, 40)))
    monkeypatch.setattr(linear_product, "HAS_BF16", False)
    assert torch.equal(product(x_MK, weight_NK), linear(x_MK.float(), weight_NK.float()).bfloat16())
    assert torch.equal(weight_gradient(grad_MN, x_MK), grad_MN.float().t() @ x_MK.float())


@pytest.mark.parametrize(("frozen", "new_blocks"), [(None, None), ("bf16", None), ("bf16", "bf16")])
def test_a_specs_keys_reach_the_linears_they_name(
    tmp_path: Path, fill: Callable[[Store], dict[str, SnapshotId]], frozen: str | None, new_blocks: str | None
) -> None:
    store = Store(tmp_path / "store")
    expansion = fill(store)["expansion"]
    model = load_model(store.materialize(expansion), torch.float32)
    rates, names = LearningRates(new_blocks=1e-3), checkpoint_names(store, expansion)
    groups, _ = train_only(model, names, rates, frozen, new_blocks)
    trained = {id(parameter) for group in groups for parameter in group.parameters.values()}
    found: dict[bool, set[type]] = {False: set(), True: set()}
    for module in model.get_decoder().layers.modules():
        if isinstance(module, nn.Linear):
            found[id(module.weight) in trained].add(type(module))
    kinds = {None: {nn.Linear}, "bf16": {Bf16Linear}}
    assert found == {False: kinds[frozen], True: kinds[new_blocks]}
    assert type(model.get_output_embeddings()) is nn.Linear
