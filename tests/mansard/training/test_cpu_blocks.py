"""Blocks as a CPU trains them: transformers' values and gradients, under transformers' names."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mansard.models.freeze import freeze_except
from mansard.training.attention import attention_inputs, use_packed_attention
from mansard.training.cpu_attention import Attention
from mansard.training.cpu_blocks import GatedMLP, Norm, speed_up
from mansard.training.linear_product import shorten

pytestmark = pytest.mark.slow
SIZES = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
POSITIONS = torch.stack([torch.arange(20), torch.arange(20) % 13])
TOKENS = torch.arange(40).view(2, 20)


def model_of(kind: str, trained_block: int, **others: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **others))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    trained = {n for n, _ in model.named_parameters() if f"layers.{trained_block}." in n}
    freeze_except(model, trained)
    use_packed_attention(model)
    return model


def states_and_gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    inputs = attention_inputs(model.config, POSITIONS, torch.float32, torch.device("cpu"))
    states: torch.Tensor = model.get_decoder()(
        input_ids=TOKENS, position_ids=POSITIONS, use_cache=False, **inputs
    ).last_hidden_state
    states.square().sum().backward()
    return states.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("trained_block", [0, 1])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_model_computes_what_it_did(kind: str, trained_block: int) -> None:
    right, wanted = states_and_gradients(model_of(kind, trained_block))
    model = model_of(kind, trained_block)
    speed_up(model.get_decoder())
    found, gradients = states_and_gradients(model)
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-4 * float(wanted[name].abs().max()), rtol=0.0)


@pytest.mark.parametrize("trained_too", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_with_products_in_bf16_it_computes_what_its_linears_do_one_by_one(kind: str, trained_too: bool) -> None:
    exact, _ = states_and_gradients(model_of(kind, 1))
    found = []
    for is_fast in (False, True):
        model = model_of(kind, 1)
        shorten(model.get_decoder().layers, True, trained_too)
        if is_fast:
            speed_up(model.get_decoder())
            of_trained = torch.bfloat16 if trained_too else torch.float32
            types = [module.products for module in model.modules() if isinstance(module, GatedMLP)]
            assert types == [torch.bfloat16, of_trained, torch.bfloat16]
            attentions = [module.products for module in model.modules() if isinstance(module, Attention)]
            assert attentions == (types if kind == "llama" else [])  # Qwen2's have biases
        found.append(states_and_gradients(model))
    (one_by_one, wanted), (together, gradients) = found
    # Between an MLP's products, too, values are rounded where they are one operation.
    largest = float(exact.abs().max())
    assert 0.0 < float((together - exact).abs().max()) < 0.05 * largest
    assert float((together - one_by_one).abs().max()) < 0.03 * largest
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert float((gradient - wanted[name]).norm()) < 0.05 * float(wanted[name].norm()), name


def test_it_generates_with_a_cache_what_it_generates_without() -> None:
    right = model_of("llama", 1).eval()
    model = model_of("llama", 1).eval()
    speed_up(model.get_decoder())
    given = {"input_ids": TOKENS[:1, :7], "attention_mask": torch.ones(1, 7, dtype=torch.int64), "max_new_tokens": 12,
             "do_sample": False, "pad_token_id": 0, "eos_token_id": None}  # fmt: skip
    wanted = right.generate(**given, use_cache=False)
    assert torch.equal(model.generate(**given, use_cache=True), wanted)
    assert torch.equal(model.generate(**given, use_cache=False), wanted)


def test_what_computes_something_else_stays() -> None:
    model = model_of("llama", 0, hidden_act="gelu", attention_bias=True)
    speed_up(model.get_decoder())
    assert {type(module) for module in model.modules()} & {Norm, GatedMLP, Attention} == {Norm}


def test_what_is_frozen_keeps_no_input() -> None:
    model = model_of("llama", 1)
    speed_up(model.get_decoder())
    kept = []
    above = model.get_decoder().layers[2]
    states = torch.randn(2, 20, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        above.mlp(states)
    sizes = sorted(x.numel() for x in kept if not isinstance(x, torch.nn.Parameter))
    assert sizes == [40 * 48, 40 * 48]
