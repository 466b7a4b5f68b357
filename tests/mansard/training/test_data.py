"""Training text is read strictly, and the mixture is what the spec says, the same every time."""

import json
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mansard.errors import BadInput
from mansard.training.data import Mixture, Packed, pack_texts, read_texts, require_rows


def packed(name: str, rows: int, first: int) -> Packed:
    """Rows of 4 tokens; token values tell the rows of all sources apart."""
    tokens = numpy.arange(first, first + rows * 4, dtype=numpy.int32).reshape(rows, 4)
    return Packed(name, tokens, numpy.tile(numpy.arange(4, dtype=numpy.int32), (rows, 1)), 3.0)


def mixture(weights: list[float], batch_rows: int = 4, seed: int = 0) -> Mixture:
    return Mixture([packed(f"s{i}", 5 + i, 1000 * i) for i in range(len(weights))], weights, batch_rows, seed)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "data.code.train: the file holds no text"),
        (b'{"text": "  "}\n', "data.code.train: the file holds no text"),
        (b'{"text": "a"}\n\xff\xfe', "data.code.train: byte 14 is not UTF-8"),
        (b'{"text": "a"}\nnonsense', "data.code.train: line 2 is not JSON"),
        (b'{"words": "a"}', "data.code.train: line 1 has no 'text'"),
        (b'["text"]', "data.code.train: line 1 has no 'text'"),
    ],
)
def test_damaged_text_is_refused_by_name_and_place(raw: bytes, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        read_texts(raw, "data.code.train")
    assert "\n" not in str(caught.value)


def test_a_line_separator_inside_a_text_does_not_end_the_line() -> None:
    text = "a\u2028b\x85c"
    assert read_texts(json.dumps({"text": text}, ensure_ascii=False).encode(), "x") == [text]


def test_a_source_smaller_than_a_batch_is_refused() -> None:
    small = packed("code", 3, 0)
    assert require_rows(small, "data.code.train", 3) is small
    with pytest.raises(BadInput, match=r"data\.code\.train: 12 packed tokens, at least one batch of 4 x 4 is needed"):
        require_rows(small, "data.code.train", 4)


@given(st.lists(st.floats(0.05, 1.0), min_size=1, max_size=4), st.integers(1, 40))
def test_no_source_is_ever_a_row_away_from_its_share(weights: list[float], steps: int) -> None:
    taken = mixture(weights).rows_taken(steps)
    total = sum(taken.values())
    assert total == 4 * steps
    for i, weight in enumerate(weights):
        assert abs(taken[f"s{i}"] - total * weight / sum(weights)) < len(weights)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8))
def test_a_batch_is_the_same_whatever_was_asked_before(steps: list[int]) -> None:
    used = mixture([0.3, 0.7])
    for step in steps:
        fresh = mixture([0.3, 0.7])
        assert torch.equal(used.batch(step).tokens_BT, fresh.batch(step).tokens_BT)


def test_every_row_is_seen_once_an_epoch_in_another_order() -> None:
    one = mixture([1.0], batch_rows=5)
    epochs = [[int(row[0]) for row in one.batch(step).tokens_BT] for step in range(6)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_another_seed_is_another_order() -> None:
    assert not torch.equal(mixture([1.0], seed=0).batch(0).tokens_BT, mixture([1.0], seed=1).batch(0).tokens_BT)


class Letters:
    """A tokenizer of one token a byte."""

    bos_token_id: int | None = 256
    eos_token_id: int | None = 257

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(t.encode()) for t in texts]}


def test_bytes_per_token_are_of_the_text_without_special_tokens() -> None:
    found = pack_texts("code", ["abc", "dé"], Letters(), 4, 0)
    assert found.bytes_per_token == 1.0
    assert found.tokens_RT.shape == (3, 4)
    assert int((found.tokens_RT == Letters.eos_token_id).sum()) == 2
