"""A router worker's admin face, on its Unix socket: GET /observations, /records, /metrics and /health.

Who can open the socket (mode 600) may ask. /metrics tells of all workers of the site, whichever is asked.
"""

import asyncio
import json
from typing import Any, Protocol

from aiohttp import web

from mansard.serving.client import router_observations_by_worker
from mansard.serving.router.metrics import Observations
from mansard.serving.router.prometheus import prometheus_text
from mansard.serving.split import Split, split_digest
from mansard.site import Site

SIBLING_SECONDS = 2.0
"""A sibling that does not answer by then is left out of a scrape."""


class SplitView(Protocol):
    """What a data plane carries: a router worker's SplitWatch, or what HAProxy was seen to (haproxy/driver.py)."""

    @property
    def split(self) -> Split: ...

    @property
    def problem(self) -> str | None: ...

    @property
    def problem_seconds(self) -> float: ...

    def has_lease(self, model: str) -> bool: ...


class RouterAdmin:
    """Tells what this worker knows. `is_draining` is set by its owner."""

    def __init__(self, site: Site, index: int, watch: SplitView, observations: Observations) -> None:
        self.is_draining = False
        self._site = site
        self._index = index
        self._watch = watch
        self._observations = observations

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """One request on the socket."""
        path, _, query = request.raw_path.partition("?")
        if request.method == "GET" and path == "/observations":
            return _json(self._observed(), 200)
        if request.method == "GET" and path == "/records":
            return self._records(query)
        if request.method == "GET" and path == "/metrics":
            return await self.metrics()
        if request.method == "GET" and path == "/health":
            return self.health()
        known = "GET /observations, /records?after=N, /metrics and /health are known"
        return _bad(f"{request.method[:20]} {request.raw_path[:200]}: {known}", 404)

    def health(self) -> web.Response:
        """200 while every released model has an engine for its stable version."""
        models = self._watch.split.models
        is_able = bool(models) and all(m.versions[m.stable].endpoint is not None for m in models.values())
        is_up = is_able and not self.is_draining
        tree = {"status": "ok" if is_up else "draining" if self.is_draining else "no stable version"}
        return _json(tree, 200 if is_up else 503)

    async def metrics(self) -> web.Response:
        """All workers' counters as Prometheus text; this one's own even when it is slow."""
        trees = await asyncio.to_thread(router_observations_by_worker, self._site, SIBLING_SECONDS, self._index)
        text = prometheus_text({**trees, str(self._index): self._observed()})
        return web.Response(body=text, headers={"content-type": "text/plain; version=0.0.4", "server": "mansard"})

    def _observed(self) -> dict[str, Any]:
        watch = self._watch
        leases = {name: watch.has_lease(name) for name in watch.split.models}
        tree = self._observations.as_json(watch.split.term, leases, watch.problem)
        seconds = round(watch.problem_seconds, 3)
        return {**tree, "split_digest": split_digest(watch.split), "split_problem_seconds": seconds}

    def _records(self, query: str) -> web.Response:
        name, _, number = query.partition("=")
        if query and not (name == "after" and number.isascii() and number.isdigit() and len(number) < 16):
            return _bad(f"/records?{query[:100]}: after=NUMBER is known", 400)
        return _json(self._observations.records_as_json(int(number or 0)), 200)


def _bad(message: str, status: int) -> web.Response:
    return _json({"error": {"kind": "BadInput", "message": message}}, status)


def _json(tree: object, status: int) -> web.Response:
    headers = {"server": "mansard"}
    return web.Response(body=json.dumps(tree).encode(), status=status, content_type="application/json", headers=headers)
