"""The part of an engine's HTTP API that evaluation needs. Standard library only: the host uses it after each start.

Connections are made to the engine's loopback address directly, whatever proxy the environment names.
"""

import http.client
import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from mansard.errors import MansardError, StageFailed

TIMEOUT_SECONDS = 300.0
_SNAPSHOT_ID = re.compile(r"[0-9a-f]{64}")


def get_json(endpoint: str, path: str, timeout_seconds: float = TIMEOUT_SECONDS) -> dict[str, Any]:
    """GET; MansardError in one line when the engine does not answer 200 with JSON."""
    return _ask(endpoint, "GET", path, None, timeout_seconds)


def post_json(
    endpoint: str, path: str, body: dict[str, Any], timeout_seconds: float = TIMEOUT_SECONDS
) -> dict[str, Any]:
    """POST; MansardError as above."""
    return _ask(endpoint, "POST", path, body, timeout_seconds)


def stream_events(
    endpoint: str, path: str, body: dict[str, Any], timeout_seconds: float = TIMEOUT_SECONDS
) -> Iterator[dict[str, Any]]:
    """POST with `stream: true`; yields each server-sent event as it arrives, ends at `[DONE]`."""
    connection = _connection(endpoint, timeout_seconds)
    try:
        response = _send(connection, "POST", path, {**body, "stream": True})
        if response.status != 200:
            raise MansardError(_refusal(endpoint, "POST", path, response.status, response.read()))
        while line := response.readline():
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            if line.startswith(b"data:"):
                yield json.loads(data)
        raise MansardError(f"{endpoint}{path}: the stream ended without [DONE]; see the engine's log")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise MansardError(f"{endpoint}{path}: {_words(error)}; see the engine's log") from error
    finally:
        connection.close()


def check_serves(endpoint: str, served_name: str, artifact: str, max_model_len: int | None = None) -> str:
    """The engine's version, if it serves `artifact` as `served_name`; else StageFailed.

    vLLM reports the folder it loaded; where that folder is named by a snapshot id, the id must be `artifact`. Its
    windows must be of `max_model_len` tokens where that is given.
    """
    cards = get_json(endpoint, "/v1/models")["data"]
    named = [c for c in cards if c["id"] == served_name]
    if not named:
        raise StageFailed(f"{endpoint} serves {', '.join(c['id'] for c in cards)}, not {served_name!r}")
    found = _SNAPSHOT_ID.findall(named[0].get("root") or "")
    if found and found[-1] != artifact:
        raise StageFailed(f"{endpoint} serves artifact {found[-1][:12]}, not {artifact[:12]}; start an engine for it")
    if max_model_len is not None and named[0].get("max_model_len") != max_model_len:
        length = named[0].get("max_model_len")
        raise StageFailed(f"{endpoint} takes {length} tokens, the spec's serve.max_model_len is {max_model_len}")
    return str(get_json(endpoint, "/version")["version"])


def _ask(endpoint: str, method: str, path: str, body: dict[str, Any] | None, timeout_seconds: float) -> dict[str, Any]:
    connection = _connection(endpoint, timeout_seconds)
    try:
        response = _send(connection, method, path, body)
        data = response.read()
        if response.status != 200:
            raise MansardError(_refusal(endpoint, method, path, response.status, data))
        answer = json.loads(data)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise MansardError(f"{endpoint}{path}: {_words(error)}; is the engine up?") from error
    finally:
        connection.close()
    if not isinstance(answer, dict):
        raise MansardError(f"{endpoint}{path}: a JSON object is expected, this is {type(answer).__name__}")
    return answer


def _connection(endpoint: str, timeout_seconds: float) -> http.client.HTTPConnection:
    parts = urlsplit(endpoint)
    if parts.scheme != "http" or not parts.hostname or not parts.port:
        raise MansardError(f"endpoint {endpoint!r}: http://HOST:PORT is expected")
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout_seconds)


def _send(
    connection: http.client.HTTPConnection, method: str, path: str, body: dict[str, Any] | None
) -> http.client.HTTPResponse:
    data = None if body is None else json.dumps(body).encode()
    connection.request(method, path, data, {"Content-Type": "application/json"} if data else {})
    return connection.getresponse()


def _refusal(endpoint: str, method: str, path: str, status: int, data: bytes) -> str:
    text = " ".join(data.decode(errors="replace").split())
    return f"{method} {endpoint}{path} answered {status}: {text[:200]}"


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
