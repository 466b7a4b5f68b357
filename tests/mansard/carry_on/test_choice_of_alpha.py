"""Which alpha is proposed, how much is captured, and what a report tells of a branch."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mansard.evaluation.wording import _alpha_rows
from mansard.specs.carry_on import Capture, ChooseAlpha
from mansard.specs.data import Data
from tasks.carry_on import best_alpha, rows_of, words_on

CURVES = [
    {"alpha": 0.0, "bits_per_byte": {"code": 2.5, "prose": 2.0}},
    {"alpha": 0.5, "bits_per_byte": {"code": 2.3, "prose": 2.005}},
    {"alpha": 1.0, "bits_per_byte": {"code": 2.2, "prose": 2.03}},
]


@pytest.mark.parametrize(("guard_bits", "expected"), [(0.0, 0.0), (0.01, 0.5), (0.05, 1.0)])
def test_the_alpha_that_helps_most_within_the_guards_is_taken(guard_bits: float, expected: float) -> None:
    assert best_alpha(CURVES, frozenset({"code"}), ChooseAlpha(guard_bits=guard_bits)) == expected


def test_a_fixed_alpha_is_taken_whatever_the_curves_say() -> None:
    assert best_alpha(CURVES, frozenset({"code"}), ChooseAlpha(fixed=1.5)) == 1.5


def test_an_alpha_beyond_those_trained_and_tried_is_allowed_and_said() -> None:
    far, tried = ChooseAlpha(fixed=1.5, tried=[0.5, 1.0]), ChooseAlpha(fixed=1.5, tried=[1.5])
    beyond = "alpha 1.50 is above every alpha that was trained or tried (1.00 at most)"
    assert words_on(1.5, far, 1.0) == ["alpha 1.50 is taken (the spec's)", beyond]
    assert words_on(1.5, tried, 1.0) == words_on(1.5, far, 2.0) == ["alpha 1.50 is taken (the spec's)"]
    assert words_on(0.5, ChooseAlpha(), 1.0) == ["alpha 0.50 is taken"]


@given(weights=st.lists(st.floats(0.01, 5.0), min_size=1, max_size=4), tokens=st.integers(1, 100_000))
def test_the_captured_rows_cover_the_tokens_asked_for(weights: list[float], tokens: int) -> None:
    sources = [
        {"name": str(i), "train": "t", "held_out": "h", "weight": w, "is_domain": True} for i, w in enumerate(weights)
    ]
    data = Data.model_validate({"sequence_tokens": 64, "sources": sources})
    rows = rows_of(data, Capture(tokens=tokens))
    captured = 64 * sum(r["train"] for r in rows.values())
    assert tokens - 1e-6 * tokens <= captured <= tokens + 64 * len(weights) + 64


def test_the_report_shows_every_alpha_against_the_base() -> None:
    title, rows = _alpha_rows({"alphas": CURVES, "trained_alpha": 1.0, "parameters": 1000, "bytes": 2000})
    assert "1,000 parameters" in title
    assert rows[0] == ["alpha", "code", "prose"]
    assert rows[1] == ["0 (the base)", "2.5000 (+0.0000)", "2.0000 (+0.0000)"]
    assert rows[3] == ["1", "2.2000 (-0.3000)", "2.0300 (+0.0300)"]
