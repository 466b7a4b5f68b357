"""An artifact's fingerprint: its greedy answers to the guard prompts, one prompt at a time, with log-probabilities.

Standard library only: the host takes one after each start and wake and compares it with the recorded one before traffic
moves. It tells another artifact, another engine setting or damaged weights from rounding. It is no measure of quality.

A near tie may fall either way on equal engines. So at the first token that differs, the two tokens' log-probabilities
are looked up in *both* distributions (the five likeliest tokens are kept for that): the difference counts when either
distribution puts them further apart than the tolerance. What follows a differing token is not compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mansard.errors import BadInput, MansardError
from mansard.evaluation.engine_api import post_json

ALTERNATIVES = 5
"""Tokens kept at each position; the OpenAI API's own limit for completions."""

DECIMALS = 4
PATH = "/v1/completions"


@dataclass(frozen=True, slots=True)
class Answer:
    """One greedy answer. `tokens` read `token_id:N`; `alternatives` give the likeliest tokens' log-probability."""

    prompt: str
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    alternatives: tuple[Mapping[str, float], ...]


@dataclass(frozen=True, slots=True)
class Fingerprint:
    answers: tuple[Answer, ...]

    def as_json(self) -> dict[str, Any]:
        answers = [
            {
                "prompt": a.prompt,
                "tokens": list(a.tokens),
                "logprobs": list(a.logprobs),
                "alternatives": [dict(x) for x in a.alternatives],
            }
            for a in self.answers
        ]
        return {"format": 1, "answers": answers}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Fingerprint":
        if value.get("format") != 1:
            raise BadInput(f"fingerprint has format {value.get('format')!r}; this program reads format 1")
        return Fingerprint(
            tuple(
                Answer(a["prompt"], tuple(a["tokens"]), tuple(a["logprobs"]), tuple(a["alternatives"]))
                for a in value["answers"]
            )
        )


def take(endpoint: str, served_name: str, prompts: Sequence[str], tokens: int) -> Fingerprint:
    """Ask the engine at `endpoint` each prompt for `tokens` greedy tokens; MansardError when it does not answer."""
    asked = ((prompt, post_json(endpoint, PATH, question(served_name, prompt, tokens))) for prompt in prompts)
    return Fingerprint(tuple(answer(endpoint, prompt, tree) for prompt, tree in asked))


def compare(recorded: Fingerprint, now: Fingerprint, tolerance: float) -> list[str]:
    """One line per prompt that differs by more than `tolerance` (natural log); empty when the artifact is the same."""
    asked = [a.prompt for a in recorded.answers]
    if asked != [a.prompt for a in now.answers]:
        return [f"the recorded fingerprint has {len(asked)} prompts, other ones than were asked now"]
    lines = [_difference(was, a, tolerance) for was, a in zip(recorded.answers, now.answers, strict=True)]
    return [line for line in lines if line is not None]


def question(served_name: str, prompt: str, tokens: int) -> dict[str, Any]:
    """What is posted to PATH for one prompt."""
    return {
        "model": served_name,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "seed": 0,
        "logprobs": ALTERNATIVES,
        "return_tokens_as_token_ids": True,
    }


def answer(endpoint: str, prompt: str, tree: Mapping[str, Any]) -> Answer:
    """The engine's JSON, read; MansardError when it holds no log-probabilities."""
    try:
        found = tree["choices"][0]["logprobs"]
        return Answer(
            prompt,
            tuple(found["tokens"]),
            tuple(round(float(p), DECIMALS) for p in found["token_logprobs"]),
            tuple({t: round(float(p), DECIMALS) for t, p in top.items()} for top in found["top_logprobs"]),
        )
    except (KeyError, IndexError, TypeError) as error:
        raise MansardError(f"{endpoint}: the answer to {prompt[:40]!r} holds no log-probabilities") from error


def _difference(was: Answer, now: Answer, tolerance: float) -> str | None:
    name = f"prompt {was.prompt[:40]!r}"
    for place, (token_was, token_now) in enumerate(zip(was.tokens, now.tokens, strict=False)):
        if token_was != token_now:
            gap = max(
                _gap(was.alternatives[place], token_was, token_now), _gap(now.alternatives[place], token_now, token_was)
            )
            if gap > tolerance:
                return f"{name}: token {place} was {token_was}, now {token_now}, {gap:.3f} apart (at most {tolerance})"
            return None
        moved = abs(was.logprobs[place] - now.logprobs[place])
        if not moved <= tolerance:  # also when it is not a number
            return f"{name}: log-probability of token {place} moved by {moved:.3f} (at most {tolerance})"
    if len(was.tokens) != len(now.tokens):
        return f"{name}: {len(was.tokens)} tokens were answered, now {len(now.tokens)}"
    return None


def _gap(alternatives: Mapping[str, float], chosen: str, other: str) -> float:
    """How far `other` lies below `chosen`; infinite where it is not among the likeliest."""
    if chosen not in alternatives or other not in alternatives:
        return float("inf")
    return alternatives[chosen] - alternatives[other]
