"""Item records: rounding, ties, completeness."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mansard.errors import StageFailed
from mansard.evaluation.item_records import (
    bits_record,
    check_complete,
    choice_record,
    parse_lines,
    right_or_wrong_record,
    summary_of,
    to_lines,
)


def test_bits_are_the_loglikelihood_in_base_two() -> None:
    record = bits_record("a", "f", -10 * math.log(2), 5)
    assert record == {"id": "a", "cluster": "f", "bits": 10.0, "bytes": 5}


def test_chosen_option_is_the_likeliest_per_byte() -> None:
    record = choice_record("a", "f", [-4.0, -6.0], ["é", "four"], 1)
    assert record["scores"] == [-2.0, -1.5] and record["chosen"] == 1 and record["correct"] == 1


@given(st.floats(-1e-6, 1e-6))
def test_noise_below_the_rounding_does_not_change_a_tie(noise: float) -> None:
    assert choice_record("a", "f", [-2.0 + noise, -2.0], ["aa", "bb"], 0)["chosen"] == 0


def test_lines_come_back() -> None:
    records = [bits_record("ä\u2028", "f", -1.0, 5), bits_record("b", "f", -2.0, 5)]
    assert parse_lines(to_lines(records)) == records


def test_missing_record_stops_the_stage() -> None:
    with pytest.raises(StageFailed, match="1 of 2 items were answered"):
        check_complete("s", [bits_record("a", "f", -1.0, 5)], ["a", "b"])


def test_exchanged_records_stop_the_stage() -> None:
    with pytest.raises(StageFailed, match="the record of item 'b' is that of 'a'"):
        check_complete("s", [bits_record("a", "f", -1.0, 5)], ["b"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_stop_the_stage(value: float) -> None:
    with pytest.raises(StageFailed, match="not finite"):
        check_complete("s", [bits_record("a", "f", value, 5)], ["a"])
    with pytest.raises(StageFailed, match="not finite"):
        check_complete("s", [choice_record("a", "f", [value, -1.0], ["a", "b"], 0)], ["a"])


def test_summary_knows_the_chance_of_a_blind_guess() -> None:
    records = [choice_record("a", "f", [0.0, -1.0], ["a", "b"], 0), right_or_wrong_record("b", "g", 1.0, 4, "", "")]
    summary = summary_of("s", records, "0.32.0")
    assert (summary["measure"], summary["value"], summary["chance"]) == ("accuracy", 1.0, 0.375)
