"""Packing loses nothing and lets no token see another document."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mansard.errors import BadInput
from mansard.training.packing import IGNORED, check_fits, labels_of, mask_of, pack

BOS = 0
documents = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=30), min_size=1, max_size=12)


@given(documents, st.integers(2, 16), st.sampled_from([None, BOS]))
def test_packed_rows_hold_the_documents_in_order(texts: list[list[int]], row_tokens: int, bos: int | None) -> None:
    tokens_RT, positions_RT = pack(texts, row_tokens, bos)
    kept = [t for t, p in zip(tokens_RT.flatten(), positions_RT.flatten(), strict=True) if bos is None or p != 0]
    whole = [t for text in texts for t in text]
    assert kept == whole[: len(kept)]
    assert len(whole) - len(kept) < row_tokens


@given(documents, st.integers(2, 16))
def test_every_row_and_every_document_starts_a_segment_with_bos(texts: list[list[int]], row_tokens: int) -> None:
    tokens_RT, positions_RT = pack(texts, row_tokens, BOS)
    assert (positions_RT[:, 0] == 0).all()
    assert (tokens_RT[positions_RT == 0] == BOS).all()


@given(documents, st.integers(2, 16))
def test_a_token_sees_its_own_segment_up_to_itself_and_nothing_else(texts: list[list[int]], row_tokens: int) -> None:
    positions_BT = torch.from_numpy(pack(texts, row_tokens, BOS)[1]).long()
    visible = mask_of(positions_BT, torch.float32)[:, 0] == 0
    assert torch.equal(visible.sum(-1), positions_BT + 1)
    for row, positions_T in zip(visible, positions_BT, strict=True):
        for token, position in enumerate(positions_T.tolist()):
            assert row[token, token - position : token + 1].all()


def test_labels_are_the_next_token_of_the_same_segment() -> None:
    tokens_RT, positions_RT = pack([[5, 6, 7], [8, 9]], 7, BOS)
    labels_BT = labels_of(torch.from_numpy(tokens_RT).long(), torch.from_numpy(positions_RT).long())
    assert tokens_RT.tolist() == [[BOS, 5, 6, 7, BOS, 8, 9]]
    assert labels_BT.tolist() == [[5, 6, 7, IGNORED, 8, 9, IGNORED]]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_position_embeddings": 64}, r"data\.sequence_tokens 256 is longer than .* max_position_embeddings of 64"),
        ({"vocab_size": 50}, r"the tokenizer gives token 99, the model's vocabulary has 50"),
    ],
)
def test_rows_that_do_not_fit_the_model_are_refused(config: dict[str, int], message: str) -> None:
    fitting = {"max_position_embeddings": 256, "vocab_size": 100}
    check_fits(SimpleNamespace(**fitting), 256, 99)
    with pytest.raises(BadInput, match=message):
        check_fits(SimpleNamespace(**(fitting | config)), 256, 99)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_packed_document_has_the_logits_it_has_alone(dtype: torch.dtype, tolerance: float) -> None:
    from mansard.demo.base import untrained_model

    shape = {"vocabulary": 300, "hidden": 32, "intermediate": 64, "blocks": 3, "heads": 2, "max_tokens": 64}
    model = untrained_model(shape, 0).to(dtype).eval()
    draw = torch.Generator().manual_seed(1)
    texts = [torch.randint(2, 300, (n,), generator=draw).tolist() for n in (11, 7, 9, 2)]
    tokens_RT, positions_RT = pack(texts, 33, BOS)
    tokens_BT, positions_BT = torch.from_numpy(tokens_RT).long(), torch.from_numpy(positions_RT).long()
    with torch.inference_mode():
        packed = model(
            input_ids=tokens_BT, position_ids=positions_BT, attention_mask=mask_of(positions_BT, dtype), use_cache=False
        ).logits[0]
        start = 0
        for text in texts:
            alone = model(input_ids=torch.tensor([[BOS, *text]]), use_cache=False).logits[0]
            torch.testing.assert_close(packed[start : start + len(alone)], alone, atol=tolerance, rtol=0.0)
            start += len(alone)


@pytest.mark.slow
def test_changing_one_document_leaves_the_others_bit_for_bit() -> None:
    from mansard.demo.base import untrained_model

    shape = {"vocabulary": 300, "hidden": 32, "intermediate": 64, "blocks": 3, "heads": 2, "max_tokens": 64}
    model = untrained_model(shape, 0).eval()
    tokens_RT, positions_RT = pack([[5] * 10, [6] * 10, [7] * 9], 32, BOS)
    tokens_BT, positions_BT = torch.from_numpy(tokens_RT).long(), torch.from_numpy(positions_RT).long()
    mask = mask_of(positions_BT, torch.float32)
    changed_BT = torch.where(tokens_BT == 6, 9, tokens_BT)
    with torch.inference_mode():
        before, after = (
            model(input_ids=ids, position_ids=positions_BT, attention_mask=mask, use_cache=False).logits[0]
            for ids in (tokens_BT, changed_BT)
        )
    assert torch.equal(before[:11], after[:11])
    assert not torch.equal(before[11:22], after[11:22])
    assert torch.equal(before[22:], after[22:])
