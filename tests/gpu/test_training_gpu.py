"""On an accelerator: attention lets nothing leak between documents, and FP8 products are the reference's."""

from typing import Any

import pytest
import torch

from mansard.training.attention import attention_inputs, preferred_kernels, use_packed_attention
from mansard.training.frozen_linear import FrozenLinear, TrainedLinear
from mansard.training.frozen_mlp import gated_rows, gradient_rows
from mansard.training.packing import pack

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")]
BOS = 0


def model(**others: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=304, hidden_size=256, intermediate_size=512, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                         initializer_range=0.05, attn_implementation="sdpa", **others)  # fmt: skip
    return LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()


def logits(one: Any, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    device = torch.device("cuda", 0)
    with torch.no_grad(), preferred_kernels(device):
        inputs = attention_inputs(one.config, positions, torch.bfloat16, device)
        found: torch.Tensor = one(
            input_ids=tokens.to(device), position_ids=positions.to(device), use_cache=False, **inputs
        ).logits.float()
    return found


def packed_rows() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    texts = [torch.randint(2, 300, (n,), generator=draw).tolist() for n in (90, 70, 200, 31, 120)]
    tokens, positions = pack(texts, 256, BOS)
    return torch.from_numpy(tokens).long(), torch.from_numpy(positions).long()


def test_packed_attention_equals_the_mask() -> None:
    one = model()
    tokens, positions = packed_rows()
    masked = logits(one, tokens, positions)
    use_packed_attention(one)
    torch.testing.assert_close(logits(one, tokens, positions), masked, atol=0.06, rtol=0.02)


def test_a_whole_row_equals_the_mask() -> None:
    one = model()
    tokens = packed_rows()[0]
    positions = torch.arange(256).expand_as(tokens)
    masked = logits(one, tokens, positions)
    use_packed_attention(one)
    torch.testing.assert_close(logits(one, tokens, positions), masked, atol=0.06, rtol=0.02)


def test_changing_one_document_leaves_the_others_bit_for_bit() -> None:
    one = model()
    use_packed_attention(one)
    tokens, positions = packed_rows()
    before = logits(one, tokens, positions)[0]
    changed = tokens.clone()
    changed[0, 91:162] = (changed[0, 91:162] + 7) % 300 + 2
    after = logits(one, changed, positions)[0]
    assert torch.equal(before[:91], after[:91])
    assert not torch.equal(before[91:162], after[91:162])
    assert torch.equal(before[162:], after[162:])


@pytest.mark.parametrize("kind", [FrozenLinear, TrainedLinear])
def test_fp8_on_the_device_is_the_reference(kind: Any) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 512, bias=False).bfloat16()
    linear.weight.requires_grad_(kind is TrainedLinear)
    x = torch.randn(4, 64, 256).bfloat16()
    found = []
    for device in ("cpu", "cuda"):
        one = kind(linear.to(device))
        given = x.to(device).detach().requires_grad_()
        out = one(given)
        out.backward(torch.ones_like(out) + out.detach())
        found.append((out.detach().cpu(), given.grad.cpu()))
    for reference, device_made in zip(*found, strict=True):
        error = (device_made.float() - reference.float()).norm() / reference.float().norm()
        assert error < 0.01


@pytest.mark.parametrize("size", [48, 512, 2768, 11008, 14336])
def test_the_kernels_of_a_gated_mlp_are_the_reference(size: int) -> None:
    torch.manual_seed(0)
    grad, gate, up = (torch.randn(37, size).bfloat16() for _ in range(3))
    scales = [torch.rand(size, 1) + 0.5 for _ in range(2)]
    on_device = [t.cuda() for t in (grad, gate, up, *scales)]
    reference = (*gated_rows(gate, up), *gradient_rows(grad, gate, up, *scales))
    found = (*gated_rows(*on_device[1:3]), *gradient_rows(*on_device))
    for i in range(0, 6, 2):
        exact = reference[i].float() * reference[i + 1]
        difference = (found[i].float() * found[i + 1]).cpu() - exact
        assert difference.norm() / exact.norm() < 0.005
        torch.testing.assert_close(found[i + 1].cpu(), reference[i + 1], rtol=1e-5, atol=0.0)
