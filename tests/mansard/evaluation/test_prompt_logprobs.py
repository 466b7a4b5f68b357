"""What vLLM says of a prompt, in its own JSON and in the plugin's bytes, is read as the same numbers."""

import math
from typing import Any

import pytest
from mansard_vllm.compact_logprobs import ASKS, asks, compacted

from mansard.errors import StageFailed
from mansard.evaluation.prompt_logprobs import COMPACT, continuation_scores, question

PROMPT = [7, 3, 9, 4]
OWN = [-0.10000000149011612, -2.5, -30.25]
"""Of tokens 3, 9 and 4; float32 numbers, as an engine has them."""
HIGHEST = [-0.10000000149011612, -1.0, -0.5]


def as_json(own: list[float], highest: list[float] | None) -> dict[str, Any]:
    entries: list[dict[str, Any] | None] = [None]
    for place, token in enumerate(PROMPT[1:]):
        entry = {str(token): {"logprob": own[place], "rank": 1, "decoded_token": "x"}}
        if highest is not None and highest[place] != own[place]:
            entry["99"] = {"logprob": highest[place], "rank": 1, "decoded_token": "y"}
        entries.append(entry)
    return {"index": 0, "prompt_logprobs": entries}


def as_bytes(own: list[float], highest: list[float] | None) -> dict[str, Any]:
    rows = zip(own, highest, strict=True) if highest is not None else zip(own, strict=True)
    numbers = [number for row in rows for number in row]
    value = compacted(numbers, 1 if highest is None else 2)
    return {"index": 0, "prompt_logprobs": None, "mansard_prompt_logprobs": value}


@pytest.mark.parametrize("form", [as_json, as_bytes])
@pytest.mark.parametrize(("context", "is_greedy"), [(1, False), (2, False), (3, False), (4, True)])
def test_a_continuation_is_scored_from_its_first_token_on(form: Any, context: int, is_greedy: bool) -> None:
    answer = {"choices": [form(OWN, HIGHEST)]}
    assert continuation_scores(answer, [PROMPT], [context]) == [(math.fsum(OWN[context - 1 :]), is_greedy)]
    assert continuation_scores({"choices": [form(OWN, OWN)]}, [PROMPT], [1]) == [(math.fsum(OWN), True)]
    assert continuation_scores({"choices": [form(OWN, None)]}, [PROMPT], [1])[0][0] == math.fsum(OWN)


def test_choices_are_matched_to_prompts_by_their_index() -> None:
    choices = [{**as_bytes([n * x for x in OWN], None), "index": n} for n in (2, 0, 1)]
    scores = continuation_scores({"choices": choices}, [PROMPT] * 3, [1, 1, 1])
    assert [s for s, _ in scores] == [0.0, math.fsum(OWN), pytest.approx(2 * math.fsum(OWN))]


def test_minus_infinity_is_what_vllms_json_says_and_not_a_number_stays_one() -> None:
    assert continuation_scores({"choices": [as_bytes([-0.5, -math.inf, -1.0], None)]}, [PROMPT], [2]) == [
        (-10_000.0, True)
    ]
    score, _ = continuation_scores({"choices": [as_bytes([-0.5, math.nan, -1.0], None)]}, [PROMPT], [1])[0]
    assert math.isnan(score), "a model that is not sound must not be scored"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"choices": []}, "0 of 1 prompts"),
        ({}, "0 of 1 prompts"),
        ({"choices": [{"index": 0, "logprobs": None}]}, "no log-probability a token"),
        ({"choices": [{"index": 0, "prompt_logprobs": None}]}, "no log-probability a token"),
        ({"choices": [{"index": 0, "prompt_logprobs": [None, None, None, None]}]}, "no log-probability a token"),
        ({"choices": [{"index": 0, "prompt_logprobs": [None]}]}, "no log-probability a token"),
        ({"choices": [{"index": 0, "mansard_prompt_logprobs": {"columns": 1, "float32": "AAAA?"}}]}, "no log-prob"),
        ({"choices": [{"index": 0, "mansard_prompt_logprobs": {"columns": 2, "float32": "AACAPw=="}}]}, "no log-prob"),
        ({"choices": [{"index": 0, "mansard_prompt_logprobs": {"columns": 1, "float32": "AACAPw=="}}]}, "1 log-pr.* 4"),
    ],
)
def test_an_answer_without_a_number_for_each_token_ends_the_stage_in_one_line(answer: Any, message: str) -> None:
    with pytest.raises(StageFailed, match=message):
        continuation_scores(answer, [PROMPT], [1])


def test_the_plugin_answers_compactly_only_what_it_can() -> None:
    request: dict[str, Any] = {
        "stream": False, "echo": False, "stop": [], "logprobs": None, "n": 1, "use_beam_search": False,
        **question("demo", [PROMPT], 0, 0),
    }  # fmt: skip
    assert COMPACT == ASKS and asks(type("R", (), request))
    for change in ({"vllm_xargs": None}, {"stream": True}, {"echo": True}, {"logprobs": 1}, {"n": 2}, {"stop": ["x"]},
                   {"prompt_logprobs": None}, {"prompt_logprobs": -1}, {"use_beam_search": True}):  # fmt: skip
        assert not asks(type("R", (), {**request, **change})), change
