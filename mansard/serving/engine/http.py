"""What we ask an engine over HTTP: which model it serves, how much it has in flight, one small completion.

Errors of the network become None or MansardError here; nothing above sees aiohttp's exceptions.
"""

import json
from pathlib import Path
from typing import Any

import aiohttp

from mansard.errors import MansardError
from mansard.serving.engine import metrics as engine_metrics
from mansard.serving.engine.metrics import Metrics, parse_metrics


async def _read(
    session: aiohttp.ClientSession, url: str, timeout_seconds: float, body: dict[str, Any] | None = None
) -> tuple[int, bytes] | None:
    """Status and body; None when nothing answered in time."""
    timeout = aiohttp.ClientTimeout(total=timeout_seconds)
    try:
        async with session.request("GET" if body is None else "POST", url, json=body, timeout=timeout) as response:
            return response.status, await response.read()
    except (aiohttp.ClientError, TimeoutError, OSError):
        return None


async def names(session: aiohttp.ClientSession, endpoint: str, timeout_seconds: float = 5.0) -> set[str]:
    """What /v1/models lists: the served name, and branches in slots. Nothing while nobody answers."""
    answer = await _read(session, f"{endpoint}/v1/models", timeout_seconds)
    if answer is None or answer[0] != 200:
        return set()
    try:
        return {str(card["id"]) for card in json.loads(answer[1])["data"]}
    except (ValueError, KeyError, TypeError):
        return set()


async def load_branch(
    session: aiohttp.ClientSession, endpoint: str, name: str, folder: Path, timeout_seconds: float
) -> None:
    """Take a branch into the engine under `name`; MansardError with the engine's reason."""
    body = {"lora_name": name, "lora_path": str(folder)}
    answer = await _read(session, f"{endpoint}/v1/load_lora_adapter", timeout_seconds, body)
    if answer is None:
        raise MansardError(f"{endpoint}: branch {name} was not loaded within {timeout_seconds:.0f} s")
    if answer[0] != 200:
        raise MansardError(f"{endpoint}: branch {name} was not loaded, {answer[0]}: {answer[1][:300]!r}")


async def unload_branch(session: aiohttp.ClientSession, endpoint: str, name: str, timeout_seconds: float) -> None:
    """Let the engine forget a branch; one that it does not know is forgotten already."""
    await _read(session, f"{endpoint}/v1/unload_lora_adapter", timeout_seconds, {"lora_name": name})


async def metrics(session: aiohttp.ClientSession, endpoint: str, timeout_seconds: float = 5.0) -> Metrics | None:
    """What the engine says of itself; None when it does not answer."""
    answer = await _read(session, f"{endpoint}/metrics", timeout_seconds)
    if answer is None or answer[0] != 200:
        return None
    return parse_metrics(answer[1].decode(errors="replace"))


async def in_flight(session: aiohttp.ClientSession, endpoint: str) -> int | None:
    """Requests running or waiting in the engine; None when it does not say."""
    told = await metrics(session, endpoint)
    return None if told is None else engine_metrics.in_flight(told)


async def post_json(
    session: aiohttp.ClientSession, endpoint: str, path: str, body: dict[str, Any], timeout_seconds: float
) -> dict[str, Any]:
    """The answer's JSON; MansardError when none came in time, or another one. Whoever stops waiting lets the engine
    off."""
    answer = await _read(session, f"{endpoint}{path}", timeout_seconds, body)
    if answer is None:
        raise MansardError(f"{endpoint}{path}: no answer within {timeout_seconds:.0f} s")
    try:
        tree = json.loads(answer[1])
    except ValueError:
        tree = None
    if answer[0] != 200 or not isinstance(tree, dict):
        raise MansardError(f"{endpoint}{path}: answered {answer[0]}: {answer[1][:200]!r}")
    return tree


async def complete_one_token(
    session: aiohttp.ClientSession, endpoint: str, served_name: str, timeout_seconds: float
) -> None:
    """One real request; MansardError says what came instead of an answer."""
    body = {"model": served_name, "prompt": "def", "max_tokens": 1, "temperature": 0}
    answer = await _read(session, f"{endpoint}/v1/completions", timeout_seconds, body)
    if answer is None:
        raise MansardError(f"{endpoint}: no answer to a one-token completion within {timeout_seconds:.0f} s")
    status, text = answer
    if status != 200:
        raise MansardError(f"{endpoint}: a one-token completion was answered {status}: {text[:200]!r}")
    try:
        choices = json.loads(text)["choices"]
        if not choices:
            raise MansardError(f"{endpoint}: a one-token completion has no choices: {text[:200]!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise MansardError(f"{endpoint}: a one-token completion is not the OpenAI form: {text[:200]!r}") from error
