"""Attention over short rows: what torch's computes, and the same gradients."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from mansard.training.attention import packed_attention
from mansard.training.linear_product import HAS_BF16
from mansard.training.packing import mask_of
from mansard.training.short_attention import LONGEST, is_short, short_attention

POSITIONS = torch.stack([torch.arange(150), torch.arange(150) % 70, torch.arange(150) % 149])
"""A row of one segment, one of three, one of two; no multiple of a block."""


@pytest.mark.parametrize("whole", [0, 1, 3])
def test_values_and_gradients_are_those_of_torch(whole: int) -> None:
    draw = torch.Generator().manual_seed(0)
    states = [torch.randn(3, 150, 2, 16, generator=draw).transpose(1, 2).requires_grad_() for _ in range(3)]
    masks = mask_of(POSITIONS, torch.float32)
    masks[:whole] = torch.full((150, 150), -torch.inf).triu(1)
    right = scaled_dot_product_attention(*states, attn_mask=masks, scale=0.3).transpose(1, 2)
    found = short_attention(*states, masks[whole:] if whole < 3 else None, whole, 0.3)
    torch.testing.assert_close(found, right, atol=2e-6, rtol=0.0)
    downstream = torch.randn(right.shape, generator=draw)
    wanted = torch.autograd.grad(right, states, downstream)
    torch.testing.assert_close(torch.autograd.grad(found, states, downstream), wanted, atol=5e-6, rtol=0.0)


@pytest.mark.skipif(not HAS_BF16, reason="this CPU has no units for bf16")
def test_products_in_bf16_round_and_no_more() -> None:
    draw = torch.Generator().manual_seed(0)
    states = [torch.randn(3, 150, 2, 16, generator=draw).transpose(1, 2).requires_grad_() for _ in range(3)]
    downstream = torch.randn(3, 150, 2, 16, generator=draw)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        mixed = short_attention(*states, mask_of(POSITIONS, torch.float32)[1:], 1, 0.3, dtype)
        results.append([mixed.detach(), *torch.autograd.grad(mixed, states, downstream)])
    for right, found in zip(*results, strict=True):
        assert found.dtype == torch.float32
        assert 0.0 < float((found - right).norm()) < 0.01 * float(right.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_says_in_which_type_its_products_are(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    states = [torch.randn(2, 2, 90, 16, generator=draw) for _ in range(3)]
    module: Any = SimpleNamespace(products=dtype)
    found, _ = packed_attention(module, *states, None, scaling=0.3)
    assert torch.equal(found, short_attention(*states, None, 2, 0.3, dtype))


def test_long_rows_shorter_types_and_kept_keys_stay_with_torch() -> None:
    row = torch.empty(1, 1, LONGEST, 8)
    assert is_short(row, row)
    assert not is_short(row[:, :, -1:], row)
    assert not is_short(*[torch.empty(1, 1, LONGEST + 1, 8)] * 2)
    assert not is_short(*[row.bfloat16()] * 2)
