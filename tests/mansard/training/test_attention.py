"""Attention as training runs it: what a mask says, rows of one document and packed ones side by side, no leak."""

from typing import Any

import pytest
import torch

from mansard.training.attention import attention_inputs, segment_ends, use_packed_attention, whole_rows
from mansard.training.data import Batch, as_batch
from mansard.training.packing import mask_of, pack

pytestmark = pytest.mark.slow
SHAPE = {"vocabulary": 300, "hidden": 32, "intermediate": 64, "blocks": 3, "heads": 2, "max_tokens": 64}
CPU = torch.device("cpu")


def packed_and_whole() -> Batch:
    """Four rows of 32 tokens: two of one document, two packed."""
    draw = torch.Generator().manual_seed(1)
    texts = [torch.randint(2, 300, (n,), generator=draw).tolist() for n in (10, 20, 31, 5, 25, 31)]
    return as_batch(*pack(texts, 32, 0))


def states(model: Any, batch: Batch) -> torch.Tensor:
    inputs = attention_inputs(model.config, batch.positions_BT, torch.float32, CPU)
    with torch.inference_mode():
        found: torch.Tensor = model.get_decoder()(
            input_ids=batch.tokens_BT, position_ids=batch.positions_BT, use_cache=False, **inputs
        ).last_hidden_state
    return found


def test_whole_rows_come_first_and_keep_their_labels() -> None:
    batch = packed_and_whole()
    ordered = batch.whole_first()
    assert whole_rows(batch.positions_BT) == 0
    assert whole_rows(ordered.positions_BT) == 2
    rows = {tuple(t.tolist()): tuple(lab.tolist()) for t, lab in zip(batch.tokens_BT, batch.labels_BT, strict=True)}
    again = {
        tuple(t.tolist()): tuple(lab.tolist()) for t, lab in zip(ordered.tokens_BT, ordered.labels_BT, strict=True)
    }
    assert rows == again


def test_every_row_sees_what_the_mask_lets_it_see() -> None:
    from mansard.demo.base import untrained_model

    model, batch = untrained_model(SHAPE, 0).eval(), packed_and_whole().whole_first()
    with torch.inference_mode():
        masked = model.get_decoder()(
            input_ids=batch.tokens_BT, position_ids=batch.positions_BT, use_cache=False,
            attention_mask=mask_of(batch.positions_BT, torch.float32),
        ).last_hidden_state  # fmt: skip
    use_packed_attention(model)
    assert "whole" in attention_inputs(model.config, batch.positions_BT, torch.float32, CPU)
    torch.testing.assert_close(states(model, batch), masked, atol=1e-5, rtol=0.0)


def test_changing_one_document_leaves_the_others_bit_for_bit() -> None:
    from mansard.demo.base import untrained_model

    model, batch = untrained_model(SHAPE, 0).eval(), packed_and_whole().whole_first()
    use_packed_attention(model)
    changed = batch.tokens_BT.clone()
    second = int((batch.positions_BT[2, 1:] == 0).nonzero()[0]) + 1
    changed[2, second + 1 :] = 7
    before = states(model, batch)
    after = states(model, Batch(changed, batch.positions_BT, batch.labels_BT))
    assert torch.equal(before[[0, 1, 3]], after[[0, 1, 3]])
    assert torch.equal(before[2, :second], after[2, :second])
    assert not torch.equal(before[2, second:], after[2, second:])


def test_segments_end_where_positions_start_again() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])
    assert segment_ends(positions).tolist() == [0, 3, 5, 10, 10]
