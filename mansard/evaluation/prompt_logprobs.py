"""Log-probabilities of prompts, asked of vLLM's `/v1/completions` and read: one number a token, no text.

An engine with infra/vllm-plugin answers with bytes (its compact_logprobs.py says in which form), one without it with
vLLM's own `prompt_logprobs`, an object a token; the numbers are the same.
"""

import base64
import binascii
import math
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from mansard.errors import StageFailed

COMPACT = "mansard_compact_logprobs"
"""The plugin's name for what it is asked; vLLM without it ignores the key."""


def question(served_name: str, prompts: Sequence[Sequence[int]], alternatives: int, seed: int) -> dict[str, Any]:
    """What is posted for `prompts`, token ids each; `alternatives` likeliest tokens are told beside each token."""
    return {
        "model": served_name,
        "prompt": prompts,
        "max_tokens": 1,
        "temperature": 0,
        "seed": seed,
        "prompt_logprobs": alternatives,
        "vllm_xargs": {COMPACT: 1},
    }


def continuation_scores(
    answer: Mapping[str, Any], prompts: Sequence[Sequence[int]], context_lengths: Sequence[int]
) -> list[tuple[float, bool]]:
    """Of each prompt the log-probability from its token `context_length` (1 at least) on, and whether no alternative
    is likelier than any of these tokens. StageFailed where `answer` does not hold a number for each token."""
    choices = sorted(answer.get("choices", []), key=itemgetter("index"))
    if len(choices) != len(prompts):
        raise StageFailed(f"the engine answered {len(choices)} of {len(prompts)} prompts of a request")
    return [_score(c, p, n) for c, p, n in zip(choices, prompts, context_lengths, strict=True)]


def _score(choice: Mapping[str, Any], prompt: Sequence[int], context_length: int) -> tuple[float, bool]:
    assert context_length > 0, "the first token is conditioned on nothing"
    rows_NC = _rows(choice, prompt)[context_length - 1 :]
    is_greedy = bool((rows_NC[:, 0] >= rows_NC.max(axis=1, initial=-math.inf)).all())
    return math.fsum(rows_NC[:, 0].tolist()), is_greedy


def _rows(choice: Mapping[str, Any], prompt: Sequence[int]) -> npt.NDArray[np.float64]:
    """A row for each token but the first: its own number, then those of the alternatives."""
    try:
        if compact := choice.get("mansard_prompt_logprobs"):
            flat = np.frombuffer(base64.b64decode(compact["float32"], validate=True), dtype="<f4")
            rows = flat.reshape(-1, int(compact["columns"])).astype(np.float64)
        else:
            entries = choice["prompt_logprobs"][1:]
            rows = np.array([_row(e, t) for e, t in zip(entries, prompt[1:], strict=True)], dtype=np.float64)
            rows = rows.reshape(len(prompt) - 1, -1)
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
        raise StageFailed(f"the engine's answer holds no log-probability a token ({error!r:.80})") from error
    if len(rows) != len(prompt) - 1:
        raise StageFailed(f"the engine's answer holds {len(rows)} log-probabilities for {len(prompt)} tokens")
    return rows


def _row(entry: Mapping[str, Mapping[str, Any]], token: int) -> list[float]:
    """The token's number and the highest of all: that many columns, whether or not the token is the likeliest."""
    numbers = [float(value["logprob"]) for value in entry.values()]
    return [float(entry[str(token)]["logprob"]), max(numbers)]
