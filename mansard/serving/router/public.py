"""A router worker's public face: the OpenAI API.

Guarantees: what is not on the allow-list never reaches an engine; the router's own refusals are counted against no
version; requests run in a bounded number of places until their answer's last byte is sent, a bounded number waits, more
get 429 at once (queue.py); bodies above `body_bytes` get 413, those that stop coming 408, and all bodies held at once
stay below `held_bytes` (held_bytes.py); of both no tenant, or address where nobody needs a key, gets all. A request
that is refused before its body was read ends its connection. Not covered: TLS.

aiohttp's low-level server reads the public side: its parser is the hardened one. What the router adds is measured by
tests/benchmarks/bench_router.py.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

from aiohttp import web

from mansard.serving.router.access_log import AccessLog
from mansard.serving.router.admin import RouterAdmin
from mansard.serving.router.connection import Connection, send_last, send_whole
from mansard.serving.router.forward import Forwarder, Question
from mansard.serving.router.held_bytes import HeldBody, HeldBytes
from mansard.serving.router.keys import Holder, KeyFile
from mansard.serving.router.metrics import Observations
from mansard.serving.router.policy import (
    OPERATOR_HEADER,
    Refused,
    check_path,
    engine_request,
    model_named,
    pinned_version,
    sticky_key,
    tenant_key,
)
from mansard.serving.router.queue import Places
from mansard.serving.router.rates import Rates
from mansard.serving.router.split_watch import SplitWatch
from mansard.serving.split import key_digest

METRICS_PATH = "/metrics"
CLIENT_WENT_AWAY = 499
"""In the access log only, as nginx writes it."""
PROGRESS_BYTES = 4096
"""So much of a body must come in `body_silent_seconds`."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one worker takes on. `body_seconds` is how long a client may take to send its body, and it may be silent for
    `body_silent_seconds`."""

    body_bytes: int = 8 * 1024 * 1024
    body_seconds: float = 60.0
    body_silent_seconds: float = 10.0
    held_bytes: int = 96 * 1024 * 1024
    running: int = 512
    waiting: int = 512
    wait_seconds: float = 20.0


@dataclass(frozen=True, slots=True)
class Guards:
    """Who may ask, and how often. `keys` is None where everybody may, `operators` where nobody has a token.
    `shows_version`: to everybody, also while a canary runs."""

    keys: KeyFile | None
    operators: KeyFile | None
    rates: Rates
    shows_version: bool

    def see_versions(self, headers: Mapping[str, str]) -> bool:
        """Whether who sent these may know which side of a rollout answers."""
        token = headers.get(OPERATOR_HEADER)
        return self.shows_version or (token is not None and self.operators is not None and self.operators.has(token))


@dataclass(slots=True)
class _Visit:
    """What the access log says of one request."""

    began: float
    holder: Holder | None = None
    question: Question | None = None
    body: HeldBody | None = None
    body_bytes: int = 0
    body_bytes_before: int = 0
    body_began: float = 0.0
    path: str = field(default="")

    def owner(self, request: web.BaseRequest) -> str:
        """Whose share of places and bytes it takes."""
        return f"address/{request.remote}" if self.holder is None else f"tenant/{self.holder.name}"


class Router:
    """Answers requests. It is given its watch, counters and guards; their owner polls them."""

    def __init__(
        self,
        watch: SplitWatch,
        forwarder: Forwarder,
        observations: Observations,
        guards: Guards,
        admin: RouterAdmin,
        access_log: AccessLog,
        limits: Limits,
    ) -> None:
        self._watch = watch
        self._forwarder = forwarder
        self._observations = observations
        self._guards = guards
        self._admin = admin
        self._access_log = access_log
        self._limits = limits
        self._places = Places(limits.running, limits.waiting, limits.wait_seconds)
        self._bodies = HeldBytes(limits.held_bytes)

    async def public(self, request: web.BaseRequest) -> web.StreamResponse:
        """One public request."""
        observations = self._observations
        observations.in_flight += 1
        visit = _Visit(time.monotonic())
        status = CLIENT_WENT_AWAY
        try:
            response = await self._answer(request, visit)
            status = response.status
        except Refused as refused:
            observations.refused[refused.status] += 1
            response = _refusal(refused)
            status = refused.status
        except (ConnectionError, asyncio.CancelledError):
            observations.clients_left += 1
            raise
        finally:
            observations.in_flight -= 1
            if visit.body is not None:
                visit.body.release()
            self._log(request, visit, status)
        if self._admin.is_draining and not response.prepared:
            response.force_close()
        if not request.content.is_eof():
            await send_last(request, response)
        return response

    async def _answer(self, request: web.BaseRequest, visit: _Visit) -> web.StreamResponse:
        if request.raw_path == METRICS_PATH and self._guards.operators is not None:
            self._guards.operators.holder(request.headers)
            return await self._admin.metrics()
        path = visit.path = check_path(request.method, request.raw_path)
        if path == "/health":
            return self._admin.health()
        headers, keys = request.headers, self._guards.keys
        holder = visit.holder = None if keys is None else keys.holder(headers)
        if path == "/v1/models":
            return self._models(holder)
        if holder is not None:
            self._guards.rates.check(holder, visit.began)
        body = await self._read_body(request, visit)
        model = await model_named(self._watch.split.models, body)
        if holder is not None:
            holder.check_model(model)
        tenant, address = None if holder is None else holder.name, request.remote or ""
        question = visit.question = Question(
            model=model,
            key=key_digest(model, sticky_key(tenant, headers, body, address)),
            tenant=key_digest(model, tenant_key(tenant, address)),
            pinned=pinned_version(headers),
            sees_versions=self._guards.see_versions(headers),
            payload=engine_request(path, request.method, request.raw_headers, body),
        )
        del body
        client = request.protocol if isinstance(request.protocol, Connection) else None
        async with self._places.hold(visit.owner(request), client):
            response = await self._forwarder.forward(request, question)
            if self._admin.is_draining and not response.prepared:
                response.force_close()
            await send_whole(request, response)
            return response

    async def _read_body(self, request: web.BaseRequest, visit: _Visit) -> bytes:
        """The whole body: it may have to be sent twice, and an engine should not wait for a slow client."""
        limit, content = self._limits.body_bytes, request.content
        if (request.content_length or 0) > limit:
            raise Refused(413, "invalid_request_error", f"{request.content_length} bytes; at most {limit} are taken")
        held = visit.body = self._bodies.body(visit.owner(request), content.set_exception)
        parts: list[bytes] = []
        try:
            # A small body has come with its head: no timer for that.
            async with contextlib.nullcontext() if content.is_eof() else self._body_timer(visit) as timer:
                while data := await content.readany():
                    parts.append(data)
                    visit.body_bytes += len(data)
                    if visit.body_bytes > limit:
                        raise Refused(413, "invalid_request_error", f"more than {limit} bytes; that is the most taken")
                    held.add(len(data))
                    if timer is not None:
                        self._renew(timer, visit)
            held.is_whole = True
            return parts[0] if len(parts) == 1 else b"".join(parts)
        finally:
            parts.clear()  # a refusal's traceback, which the stream keeps, would keep them while the connection lingers

    @contextlib.asynccontextmanager
    async def _body_timer(self, visit: _Visit) -> AsyncIterator[asyncio.Timeout]:
        visit.body_began = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(min(self._limits.body_seconds, self._limits.body_silent_seconds)) as timer:
                yield timer
        except TimeoutError as error:
            seconds = asyncio.get_running_loop().time() - visit.body_began
            message = f"{visit.body_bytes} bytes of the body came in {seconds:.1f} s"
            raise Refused(408, "invalid_request_error", message) from error

    def _renew(self, timer: asyncio.Timeout, visit: _Visit) -> None:
        """The next PROGRESS_BYTES may take as long again, all of it `body_seconds`."""
        if visit.body_bytes - visit.body_bytes_before >= PROGRESS_BYTES:
            visit.body_bytes_before = visit.body_bytes
            now = asyncio.get_running_loop().time()
            timer.reschedule(min(now + self._limits.body_silent_seconds, visit.body_began + self._limits.body_seconds))

    def _models(self, holder: Holder | None) -> web.Response:
        """GET /v1/models from the split: what this client can ask for, not what engines happen to run."""
        data = [
            {"id": m.versions[m.stable].served_name, "object": "model", "created": 0, "owned_by": "mansard"}
            for m in self._watch.split.models.values()
            if holder is None or holder.models is None or m.name in holder.models
        ]
        body = json.dumps({"object": "list", "data": data}).encode()
        return web.Response(body=body, content_type="application/json", headers={"server": "mansard"})

    def _log(self, request: web.BaseRequest, visit: _Visit, status: int) -> None:
        line: dict[str, object] = {
            "client": request.remote,
            "tenant": None if visit.holder is None else visit.holder.name,
            "method": request.method[:20],
            "path": visit.path or request.raw_path[:200],
            "status": status,
            "ms": round((time.monotonic() - visit.began) * 1000, 3),
            "bytes": visit.body_bytes,
            "request_id": request.headers.get("x-request-id", "")[:128],
        }
        if visit.question is not None:
            line |= {"model": visit.question.model, "user": f"{visit.question.key:016x}"}
            if visit.question.attempts:
                line |= visit.question.attempts[-1].as_line()
                line["asked"] = [attempt.version for attempt in visit.question.attempts]
        self._access_log.add(time.time(), line)


def _refusal(refused: Refused) -> web.Response:
    headers = {"server": "mansard"}
    if refused.retry_after_seconds is not None:
        headers["retry-after"] = str(refused.retry_after_seconds)
    if refused.status == 401:
        headers["www-authenticate"] = "Bearer"
    return web.Response(body=refused.body, status=refused.status, content_type="application/json", headers=headers)
