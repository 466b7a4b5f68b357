"""A router worker's public face: the OpenAI API.

Guarantees: what is not on the allow-list never reaches an engine; the router's own refusals are counted against no
version; requests run in a bounded number of places, a bounded number waits, more get 429 at once; bodies above
`body_bytes` get 413, and all bodies held at once stay below `held_bytes`. Not covered: TLS.

aiohttp's low-level server reads the public side: its parser is the hardened one. What the router adds is measured by
tests/benchmarks/bench_router.py.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from aiohttp import web

from mansard.serving.router.access_log import AccessLog
from mansard.serving.router.admin import RouterAdmin
from mansard.serving.router.forward import Forwarder, Question
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
from mansard.serving.router.queue import RETRY_AFTER_SECONDS, Places
from mansard.serving.router.rates import Rates
from mansard.serving.router.split_watch import SplitWatch
from mansard.serving.split import key_digest

METRICS_PATH = "/metrics"
CLIENT_WENT_AWAY = 499
"""In the access log only, as nginx writes it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one worker takes on. `body_seconds` is how long a client may take to send its body."""

    body_bytes: int = 8 * 1024 * 1024
    body_seconds: float = 60.0
    held_bytes: int = 256 * 1024 * 1024
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
    body_bytes: int = 0
    path: str = field(default="")


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
        self._held_bytes = 0

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
        finally:
            observations.in_flight -= 1
            self._held_bytes -= visit.body_bytes
            self._log(request, visit, status)
        if self._admin.is_draining and not response.prepared:
            response.force_close()
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
        model = model_named(self._watch.split.models, body)
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
        async with self._places:
            return await self._forwarder.forward(request, question)

    async def _read_body(self, request: web.BaseRequest, visit: _Visit) -> bytes:
        """The whole body: it may have to be sent twice, and an engine should not wait for a slow client."""
        limit, content = self._limits.body_bytes, request.content
        if (request.content_length or 0) > limit:
            raise Refused(413, "invalid_request_error", f"{request.content_length} bytes; at most {limit} are taken")
        parts = []
        try:
            # A small body has come with its head: no timer for that.
            async with asyncio.timeout(self._limits.body_seconds) if not content.is_eof() else contextlib.nullcontext():
                while data := await content.readany():
                    parts.append(data)
                    visit.body_bytes += len(data)
                    self._held_bytes += len(data)
                    if visit.body_bytes > limit:
                        raise Refused(413, "invalid_request_error", f"more than {limit} bytes; that is the most taken")
                    if self._held_bytes > self._limits.held_bytes:
                        message = f"requests of {self._limits.held_bytes} bytes are in work"
                        raise Refused(429, "rate_limit_error", message, RETRY_AFTER_SECONDS)
        except TimeoutError as error:
            message = f"the body was not there after {self._limits.body_seconds:g} s"
            raise Refused(408, "invalid_request_error", message) from error
        return parts[0] if len(parts) == 1 else b"".join(parts)

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
