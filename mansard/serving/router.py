"""A router worker's two faces: the public OpenAI API, and the admin socket.

Guarantees: what is not on the allow-list never reaches an engine; the router's own refusals are counted against no
version; at most `in_flight` requests are held, more get 429 at once; bodies above `body_bytes` get 413.
Not covered: TLS, request rates per tenant, a deadline for a client that opens a connection and sends nothing.

aiohttp's low-level server reads the public side: its parser is the hardened one. With the engines' side on plain
protocols (router_engine.py) the router adds 0.45 ms to the median time to first token and 0.9 ms to its p99
(tests/benchmarks/bench_router.py, 64 paced streams, 2 cores, at real-time priority because others used them, 2026-11).
"""

import asyncio
import contextlib
import json
from dataclasses import dataclass

from aiohttp import web

from mansard.serving.router_engine import EnginePool
from mansard.serving.router_forward import RETRY_AFTER_SECONDS, Forwarder, Question
from mansard.serving.router_metrics import Observations, prometheus_text
from mansard.serving.router_policy import (
    ApiKeys,
    Refused,
    check_path,
    engine_request,
    model_named,
    pinned_version,
    sticky_key,
)
from mansard.serving.router_split import SplitWatch


@dataclass(frozen=True, slots=True)
class Limits:
    """What one worker takes on. `body_seconds` is how long a client may take to send its body."""

    body_bytes: int = 8 * 1024 * 1024
    body_seconds: float = 60.0
    in_flight: int = 512


class Router:
    """Answers requests. It is given its watch, pool and counters; `watch` is polled by its owner."""

    def __init__(
        self, watch: SplitWatch, pool: EnginePool, observations: Observations, keys: ApiKeys | None, limits: Limits
    ) -> None:
        self.is_draining = False
        self._watch = watch
        self._observations = observations
        self._keys = keys
        self._limits = limits
        self._forwarder = Forwarder(watch, pool, observations)

    async def public(self, request: web.BaseRequest) -> web.StreamResponse:
        """One public request."""
        observations = self._observations
        observations.in_flight += 1
        try:
            response = await self._answer(request)
        except Refused as refused:
            observations.refused[refused.status] += 1
            response = _refusal(refused)
        finally:
            observations.in_flight -= 1
        if self.is_draining and not response.prepared:
            response.force_close()
        return response

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        path = check_path(request.method, request.raw_path)
        if path == "/health":
            return self._health()
        headers = request.headers
        tenant = None if self._keys is None else self._keys.tenant(headers)
        if path == "/v1/models":
            return self._models()
        if self._observations.in_flight > self._limits.in_flight:
            message = f"{self._limits.in_flight} requests are in flight"
            raise Refused(429, "rate_limit_error", message, RETRY_AFTER_SECONDS)
        body = await self._read_body(request)
        question = Question(
            model=model_named(self._watch.split.models, body),
            sticky_key=sticky_key(tenant, headers, request.remote or ""),
            pinned=pinned_version(headers),
            payload=engine_request(path, request.method, request.raw_headers, body),
        )
        return await self._forwarder.forward(request, question)

    async def _read_body(self, request: web.BaseRequest) -> bytes:
        """The whole body: it may have to be sent twice, and an engine should not wait for a slow client."""
        limit, content = self._limits.body_bytes, request.content
        if (request.content_length or 0) > limit:
            raise Refused(413, "invalid_request_error", f"{request.content_length} bytes; at most {limit} are taken")
        parts, size = [], 0
        try:
            # A small body has come with its head: no timer for that.
            async with asyncio.timeout(self._limits.body_seconds) if not content.is_eof() else contextlib.nullcontext():
                while data := await content.readany():
                    parts.append(data)
                    size += len(data)
                    if size > limit:
                        raise Refused(413, "invalid_request_error", f"more than {limit} bytes; that is the most taken")
        except TimeoutError as error:
            message = f"the body was not there after {self._limits.body_seconds:g} s"
            raise Refused(408, "invalid_request_error", message) from error
        return b"".join(parts)

    def _health(self) -> web.Response:
        """200 while every released model has an engine for its stable version."""
        models = self._watch.split.models
        is_able = bool(models) and all(m.versions[m.stable].endpoint is not None for m in models.values())
        is_up = is_able and not self.is_draining
        tree = {"status": "ok" if is_up else "draining" if self.is_draining else "no stable version"}
        return _json(tree, 200 if is_up else 503)

    def _models(self) -> web.Response:
        """GET /v1/models from the split: what can be asked for, not what engines happen to run."""
        data = [
            {"id": m.versions[m.stable].served_name, "object": "model", "created": 0, "owned_by": "mansard"}
            for m in self._watch.split.models.values()
        ]
        return _json({"object": "list", "data": data}, 200)

    async def admin(self, request: web.BaseRequest) -> web.StreamResponse:
        """The Unix socket: GET /observations, /metrics, /health."""
        if request.method != "GET" or request.raw_path not in ("/observations", "/metrics", "/health"):
            message = f"{request.method} {request.raw_path}: GET /observations, /metrics and /health are known"
            return _json({"error": {"kind": "BadInput", "message": message}}, 404)
        if request.raw_path == "/health":
            return self._health()
        watch = self._watch
        leases = {name: watch.has_lease(name) for name in watch.split.models}
        tree = self._observations.as_json(watch.split.term, leases, watch.problem)
        if request.raw_path == "/metrics":
            return web.Response(body=prometheus_text(tree), headers={"content-type": "text/plain; version=0.0.4"})
        return _json(tree, 200)


def _refusal(refused: Refused) -> web.Response:
    headers = {"server": "mansard"}
    if refused.retry_after_seconds is not None:
        headers["retry-after"] = str(refused.retry_after_seconds)
    if refused.status == 401:
        headers["www-authenticate"] = "Bearer"
    return web.Response(body=refused.body, status=refused.status, content_type="application/json", headers=headers)


def _json(tree: object, status: int) -> web.Response:
    headers = {"server": "mansard"}
    return web.Response(body=json.dumps(tree).encode(), status=status, content_type="application/json", headers=headers)
