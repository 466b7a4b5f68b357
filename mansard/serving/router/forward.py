"""One request through the router: ask a version, rescue on stable before the first byte, pass the answer on.

Guarantees: nothing reaches the client before the version that will answer is certain, so a rescue is invisible to it; a
stream is handed on chunk by chunk; a client that goes away cancels the engine's work; an accepted stream keeps its
engine whatever the split does; an engine that stalls for `silent_seconds` has failed; every answer says which version
gave it, but while a canary runs only to those who may know (policy.py, OPERATOR_HEADER): to others nothing of ours in
an answer names the side. A request that pins a version is never rescued: a tester wants that version's own answer.
"""

import asyncio
import json
from dataclasses import dataclass, field

from aiohttp import web

from mansard.serving.router.engine_connection import EngineConnection, EngineFailed, EngineHead
from mansard.serving.router.metrics import Attempt, Observations
from mansard.serving.router.policy import (
    MODEL_HEADER,
    OPERATOR_HEADER,
    VERSION_HEADER,
    Refused,
    asked_by_name,
    error_body,
)
from mansard.serving.router.pool import EnginePool
from mansard.serving.router.queue import RETRY_AFTER_SECONDS
from mansard.serving.router.split_watch import SplitWatch
from mansard.serving.split import choose

WHOLE_ANSWER_BYTES = 256 * 1024
"""Answers with a known length up to this are read whole before anything is sent, so that they too can be rescued. Times
the places it is what a worker may hold of answers that nobody reads."""
PROGRESS_BYTES = 1024
"""So much, or a line's end, is progress of an engine; less drips."""
_ERROR_EVENT = b'data: {"error"'


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of whom. `key` is the sticky key's digest, `tenant` that of whose it is, `payload` the request as
    an engine gets it. `sees_versions`: also while a canary runs.

    `attempts` are the versions' parts in it, as they begin.
    """

    model: str
    key: int
    tenant: int
    pinned: int | None
    sees_versions: bool
    payload: bytes
    attempts: list[Attempt] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer whose first bytes are there: all of them (`is_whole`), or those of a stream that goes on."""

    version: int
    endpoint: str
    connection: EngineConnection
    head: EngineHead
    first: bytes
    is_whole: bool


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a version gave no usable answer. `answer` is its own 5xx, where it is whole."""

    problem: str
    answer: Answer | None = None


class Forwarder:
    """Shared by all requests of a worker."""

    def __init__(self, watch: SplitWatch, pool: EnginePool, observations: Observations, silent_seconds: float) -> None:
        self._silent_seconds = silent_seconds
        self._watch = watch
        self._pool = pool
        self._observations = observations

    async def forward(self, request: web.BaseRequest, question: Question) -> web.StreamResponse:
        """Ask, rescue, answer. Raises Refused when no version can."""
        version, tried = self._first_choice(question), set[int]()
        while True:
            tried.add(version)
            with self._observations.attempt(question.model, version, question.key, question.tenant) as attempt:
                question.attempts.append(attempt)
                answer = await self._ask(question, version)
                if isinstance(answer, Answer):
                    return await self._pass_on(request, question, answer, attempt)
                attempt.failed(answer.problem)
                rescuer = None if question.pinned is not None else self._rescuer(question.model, tried)
                if rescuer is not None:
                    attempt.rescued()
            if rescuer is None:
                return self._give_up(question, version, answer)
            version = rescuer

    def _first_choice(self, question: Question) -> int:
        model = self._watch.serving(question.model)
        if question.pinned is None:
            return choose(model, question.key)
        if self._hides_version(question):
            message = f"while a canary runs a version is pinned with an operator's token alone: {OPERATOR_HEADER}"
            raise Refused(403, "permission_error", message)
        if question.pinned not in model.versions:
            known = ", ".join(map(str, sorted(model.versions)))
            raise Refused(
                404, "not_found_error", f"version {question.pinned} of {model.name} is not resident; {known} are"
            )
        if question.pinned == self._watch.split.models[model.name].canary != model.canary:
            message = f"the rollout of version {question.pinned} has lost its controller; it serves nobody"
            raise Refused(503, "service_unavailable", message, RETRY_AFTER_SECONDS)
        return question.pinned

    def _hides_version(self, question: Question) -> bool:
        model = self._watch.split.models.get(question.model)
        return not question.sees_versions and model is not None and model.canary is not None

    def _stamp(self, question: Question, version: int) -> dict[str, str]:
        told = {} if self._hides_version(question) else {VERSION_HEADER: str(version)}
        return {**told, MODEL_HEADER: question.model, "server": "mansard"}

    def _rescuer(self, model: str, tried: set[int]) -> int | None:
        """Stable as it is now: while a request waited the split may have moved on."""
        known = self._watch.split.models.get(model)
        return known.stable if known is not None and known.stable not in tried else None

    async def _ask(self, question: Question, version: int) -> Answer | Failure:
        """The version's answer up to its first bytes, or why it gave none."""
        known = self._watch.split.models[question.model].versions.get(version)
        if known is None or known.endpoint is None:
            return Failure(f"no engine holds version {version}")
        try:
            payload = asked_by_name(question.payload, question.model, known.served_name)
            connection, head = await self._pool.ask(known.endpoint, payload)
        except EngineFailed as error:
            return Failure(str(error))
        is_whole = not head.is_event_stream and head.length is not None and head.length <= WHOLE_ANSWER_BYTES
        try:
            parts = [await connection.read()]
            connection.allow(self._silent_seconds)
            while is_whole and parts[-1]:
                parts.append(await connection.read())
        except EngineFailed as error:
            connection.abort()
            return Failure(str(error))
        except asyncio.CancelledError:  # the client went away: the engine must not go on for nobody
            connection.abort()
            raise
        return self._judge(Answer(version, known.endpoint, connection, head, b"".join(parts), is_whole))

    def _judge(self, answer: Answer) -> Answer | Failure:
        """An answer that arrived is still a failure when it is a 5xx, empty, or begins with the engine's own error."""
        head, first = answer.head, answer.first
        if head.status < 500 and not head.is_event_stream:
            return answer
        if head.status < 500 and first and (not first.startswith(_ERROR_EVENT) or _blames_client(first)):
            return answer
        problem = f"status {head.status}: {first[:200].decode('utf-8', 'replace') or 'nothing'}"
        if answer.is_whole:
            self._pool.put_back(answer.endpoint, answer.connection)
            return Failure(problem, answer)
        answer.connection.abort()
        return Failure(problem)

    async def _pass_on(
        self, request: web.BaseRequest, question: Question, answer: Answer, attempt: Attempt
    ) -> web.StreamResponse:
        """Give the client the answer, counting how it ended."""
        if answer.is_whole:
            self._pool.put_back(answer.endpoint, answer.connection)
            attempt.answered(answer.head.status)
            attempt.whole(answer.first)
            return _response(answer, self._stamp(question, answer.version))
        attempt.first_byte()
        stamp = self._stamp(question, answer.version)
        response = web.StreamResponse(status=answer.head.status, headers=_headers(answer, stamp))
        try:
            await response.prepare(request)
            await self._stream(response, answer, attempt)
        except EngineFailed as error:
            attempt.failed(str(error))
            name = f"version {answer.version}" if VERSION_HEADER in stamp else "the engine"
            told = f": {error}" if VERSION_HEADER in stamp else ""
            await _break_off(request, response, answer, f"{name} broke off this answer{told}")
        except (asyncio.CancelledError, ConnectionError):  # the client went away
            answer.connection.abort()
            raise
        return response

    async def _stream(self, response: web.StreamResponse, answer: Answer, attempt: Attempt) -> None:
        """Chunk by chunk. An error event that the engine sends under way passes through and counts against it."""
        problem, data, connection, num_bytes = b"", answer.first, answer.connection, 0
        while data:
            attempt.streamed(data)
            await response.write(data)
            num_bytes += len(data)
            if num_bytes >= PROGRESS_BYTES or b"\n" in data:
                connection.allow(self._silent_seconds)
                num_bytes = 0
            data = await connection.read()
            if data.startswith(_ERROR_EVENT):
                problem = data[:300]
        if problem and not _blames_client(problem):
            attempt.failed(problem.decode("utf-8", "replace"))
        else:
            attempt.answered(answer.head.status)
        self._pool.put_back(answer.endpoint, connection)
        await response.write_eof()

    def _give_up(self, question: Question, version: int, failure: Failure) -> web.Response:
        """Nobody is left to ask: the engine's own 5xx as it is, else 503."""
        if failure.answer is not None:
            return _response(failure.answer, self._stamp(question, version))
        self._observations.refused[503] += 1
        stamp = self._stamp(question, version)
        name = f"version {version} of {question.model}" if VERSION_HEADER in stamp else question.model
        message = f"{name} does not answer; try again"
        headers = {**stamp, "retry-after": str(RETRY_AFTER_SECONDS)}
        body = error_body("service_unavailable", message, 503)
        return web.Response(body=body, status=503, content_type="application/json", headers=headers)


def _blames_client(event: bytes) -> bool:
    """Whether an error event carries a 4xx code, as vLLM sends for a bad request found late."""
    try:
        code = json.loads(event.partition(b"\n")[0].removeprefix(b"data: "))["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return False
    return isinstance(code, int) and 400 <= code < 500


async def _break_off(request: web.BaseRequest, response: web.StreamResponse, answer: Answer, message: str) -> None:
    """The engine died with the answer under way: an error event where the client reads events, then the end."""
    if not answer.head.is_event_stream:
        if request.transport is not None:
            request.transport.abort()  # a clean end would make half an answer look whole
        return
    await response.write(b"data: " + error_body("engine_failed", message, 502) + b"\n\n")
    response.force_close()
    await response.write_eof()


def _headers(answer: Answer, stamp: dict[str, str]) -> list[tuple[str, str]]:
    kept = [(n.decode("latin-1"), v.decode("latin-1")) for n, v in answer.head.headers]
    return [(n, v) for n, v in kept if n not in (*stamp, VERSION_HEADER, "date")] + list(stamp.items())


def _response(answer: Answer, stamp: dict[str, str]) -> web.Response:
    return web.Response(status=answer.head.status, headers=_headers(answer, stamp), body=answer.first)
