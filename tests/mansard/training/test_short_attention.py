"""Attention over short rows: what torch's computes, and the same gradients."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

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


def test_long_rows_shorter_types_and_kept_keys_stay_with_torch() -> None:
    row = torch.empty(1, 1, LONGEST, 8)
    assert is_short(row, row)
    assert not is_short(row[:, :, -1:], row)
    assert not is_short(*[torch.empty(1, 1, LONGEST + 1, 8)] * 2)
    assert not is_short(*[row.bfloat16()] * 2)
