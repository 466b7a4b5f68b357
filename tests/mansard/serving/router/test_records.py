"""Records and counts of requests, with a clock of our own."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mansard.serving.router import records as router_records
from mansard.serving.router.metrics import Observations
from mansard.serving.router.records import Ended, Records


def numbered(number: int) -> Ended:
    return Ended(float(number), "tiny", 1, number, "ok", None, None, 0.1, number, 1)


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 30), st.integers(1, 10))
def test_a_reader_gets_each_record_once_and_knows_what_it_missed(bursts: list[int], kept: int, a_time: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(router_records, "MAX_RECORDS", kept)
        patch.setattr(router_records, "MAX_PER_ANSWER", a_time)
        records, after, seen, lost, number = Records(), 0, [], 0, 0
        for burst in bursts:
            for _ in range(burst):
                number += 1
                records.add(numbered(number))
            has_more = True
            while has_more:
                answer = json.loads(json.dumps(records.after(after)))
                seen += [record[8] for record in answer["records"]]
                lost += answer["lost"]
                after, has_more = answer["next"], answer["has_more"]
    assert seen == sorted(set(seen))
    assert len(seen) + lost == number
    assert seen[-1:] == ([number] if number else [])


def test_a_number_from_before_a_restart_counts_as_none() -> None:
    records = Records()
    records.add(numbered(1))
    assert len(records.after(500)["records"]) == 1


def ended(observations: Observations) -> dict[str, Any]:
    answer = observations.records_as_json(0)
    return dict(zip(answer["fields"], answer["records"][-1], strict=True))


def test_a_streams_record_tells_first_token_time_per_token_and_length() -> None:
    now = 100.0
    observations = Observations(lambda: now)
    with observations.attempt("tiny", 2, 7, 9) as attempt:
        now = 101.0
        assert observations.records_as_json(0)["in_flight"] == [["tiny", 2, f"{7:016x}", 1.0, False, f"{9:016x}"]]
        attempt.first_byte()
        attempt.streamed(b"data: a\n\n")
        for at, piece in ((102.0, b"data: b\n\ndata: c\n\n"), (104.0, b"data: d\n\n"), (109.0, b"data: [DONE]\n\n")):
            now = at
            assert observations.records_as_json(0)["in_flight"][0][4] is True
            attempt.streamed(piece)
        attempt.answered(200)
    record = ended(observations)
    assert (record["ttft"], record["token"], record["latency"], record["output_tokens"]) == (1.0, 1.0, 9.0, 4)
    assert (record["key"], record["tenant"], record["outcome"]) == (f"{7:016x}", f"{9:016x}", "ok")
    counts = observations.as_json(1, {}, None)["models"]["tiny"]["versions"]["2"]
    assert (counts["output_tokens"], sum(counts["token"]["counts"])) == (4, 1)


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        (b'{"usage": {"prompt_tokens": 1, "completion_tokens": 12, "total_tokens": 13}}', 12),
        (b'{"usage":{"prompt_tokens":1,"completion_tokens":12}}', 12),
        (b'{"text": "\\"completion_tokens\\": 3", "usage": {"completion_tokens": null}}', None),
        (b"", None),
    ],
)
def test_a_whole_answers_length_is_what_its_usage_says(body: bytes, tokens: int | None) -> None:
    observations = Observations(lambda: 1.0)
    with observations.attempt("tiny", 1, 7, 9) as attempt:
        attempt.answered(200)
        attempt.whole(body)
    assert ended(observations)["output_tokens"] == tokens
