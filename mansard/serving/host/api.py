"""The host's protocol: HTTP/JSON on a Unix socket. Each handler reads one body, calls one part, answers one object.

Every body has "format": 1. An error is {"format": 1, "error": {"kind", "message"}} with 400, 403, 404, 409, 500 or 503;
`kind` is a class of mansard.errors. Not covered: who may ask; the socket has mode 600.
"""

import json
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from aiohttp import web
from pydantic import ValidationError

from mansard.errors import (
    BadInput,
    Conflict,
    Corrupt,
    JournalDamaged,
    JournalDown,
    MansardError,
    NotAllowed,
    StageFailed,
)
from mansard.serving.engine.command import EngineIdentity
from mansard.serving.host.engines import Engines
from mansard.serving.host.rollback import Rollback, RollbackRequest
from mansard.serving.host.rollouts import Rollouts
from mansard.site import Site
from mansard.specs.whole import Serve

FORMAT = 1
MAX_BODY_BYTES = 1 << 20
_STATUS = (
    *((BadInput, 400), (NotAllowed, 403), (Conflict, 409), (JournalDamaged, 500), (Corrupt, 500), (StageFailed, 500)),
    *((JournalDown, 503), (MansardError, 500)),
)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Host(Protocol):
    """What the handlers need of the host."""

    site: Site
    engines: Engines
    rollouts: Rollouts
    rollback: Rollback

    def alive(self) -> dict[str, Any]: ...

    async def status(self) -> dict[str, Any]: ...

    async def wait_until_open(self) -> None: ...


def make_app(host: Host) -> web.Application:
    """The routes of contract and README."""
    app = web.Application(middlewares=[_answer_errors], client_max_size=MAX_BODY_BYTES)
    handlers = Handlers(host)
    app.add_routes(
        [
            web.get("/alive", handlers.alive),
            web.get("/status", handlers.status),
            web.post("/engines", handlers.start_engine),
            web.post("/engines/prepare", handlers.prepare_engine),
            web.post("/engines/stop", handlers.stop_engine),
            web.post("/rollouts", handlers.start_rollout),
            web.get("/rollouts/{model}", handlers.rollout),
            web.get("/rollouts/{model}/users/{version:[0-9]{1,9}}", handlers.release_users),
            web.post("/rollback", handlers.roll_back),
        ]
    )
    return app


class Handlers:
    """One method per route."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def alive(self, request: web.Request) -> web.Response:
        """Without the journal, which may give no answer."""
        return _json(self._host.alive())

    async def status(self, request: web.Request) -> web.Response:
        return _json(await self._host.status())

    async def start_engine(self, request: web.Request) -> web.Response:
        """Starts or finds the engine of an artifact; with `wait: false` answers while it starts."""
        body = await self._body(request, {"model": str, "artifact": str, "serve": dict}, {"wait": bool})
        try:
            serve = Serve.model_validate(body["serve"])
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise BadInput(f"serve.{place}: {first['input']!r:.80}: {first['msg']}") from error
        identity = EngineIdentity(body["artifact"], self._model(body["model"]), serve)
        await self._host.wait_until_open()
        engine = await self._host.engines.ensure(identity, wait=body.get("wait", True))
        return _json(engine.describe())

    async def prepare_engine(self, request: web.Request) -> web.Response:
        """An engine will be asked for soon: a process imports what it needs meanwhile."""
        body = await self._body(request, {"architecture": str}, {})
        await self._host.wait_until_open()
        return _json({"pid": await self._host.engines.prepare(body["architecture"])})

    async def stop_engine(self, request: web.Request) -> web.Response:
        body = await self._body(request, {"artifact": str}, {})
        await self._host.wait_until_open()
        return _json({"stopped": await self._host.engines.stop_artifact(body["artifact"])})

    async def start_rollout(self, request: web.Request) -> web.Response:
        body = await self._body(request, {"model": str, "version": int, "who": str, "why": str}, {})
        await self._host.wait_until_open()
        walk = await self._host.rollouts.start(self._model(body["model"]), body["version"], body["who"], body["why"])
        return _json({"started": True, **walk.describe()})

    async def rollout(self, request: web.Request) -> web.Response:
        await self._host.wait_until_open()
        return _json(await self._host.rollouts.state(self._model(request.match_info["model"])))

    async def release_users(self, request: web.Request) -> web.Response:
        """What a release of the version would find, whether or not it may start."""
        await self._host.wait_until_open()
        model, version = self._model(request.match_info["model"]), int(request.match_info["version"])
        return _json((await self._host.rollouts.users(model, version)).as_json())

    async def roll_back(self, request: web.Request) -> web.Response:
        body = await self._body(
            request, {"model": str, "who": str}, {"why": str, "hard": bool, "from": int, "to": int}
        )
        await self._host.wait_until_open()
        asked = RollbackRequest(
            model=self._model(body["model"]),
            from_version=body.get("from"),
            to_version=body.get("to"),
            hard=body.get("hard", False),
            who=body["who"],
            why=body.get("why", ""),
        )
        return _json(await self._host.rollback.run(asked))

    def _model(self, name: str) -> str:
        return self._host.site.model_named(name)

    async def _body(
        self, request: web.Request, needed: dict[str, type], optional: dict[str, type]
    ) -> dict[str, Any]:
        """The request's JSON with exactly these keys; an optional one that is null counts as absent."""
        try:
            tree = json.loads(await request.read())
        except ValueError as error:
            raise BadInput(f"{request.path}: the body is not JSON: {error}") from error
        if not isinstance(tree, dict) or tree.pop("format", None) != FORMAT:
            raise BadInput(f'{request.path}: the body must be an object with "format": {FORMAT}')
        tree = {k: v for k, v in tree.items() if not (v is None and k in optional)}
        missing = [key for key in needed if key not in tree]
        if missing:
            raise BadInput(f"{request.path}: key {missing[0]!r} is missing")
        for key, value in tree.items():
            kind = {**needed, **optional}.get(key, type(None))
            if type(value) is not kind:
                raise BadInput(f"{request.path}: {key}: {value!r:.80} is not {_wanted(key, kind, needed, optional)}")
        return tree


def _wanted(key: str, kind: type, needed: dict[str, type], optional: dict[str, type]) -> str:
    known = {**needed, **optional}
    return f"of type {kind.__name__}" if key in known else f"expected; known keys: {', '.join(known)}"


@web.middleware
async def _answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except MansardError as error:
        kind, status = next((k, s) for k, s in _STATUS if isinstance(error, k))
        return _error(status, kind.__name__, str(error))
    except OSError as error:  # a full disk, no free descriptor
        return _error(500, "MansardError", f"{request.method} {request.path}: {error}; look at: mansard status")
    except web.HTTPException as error:
        return _error(error.status, "BadInput", f"{request.method} {request.path}: {error.reason}")


def _error(status: int, kind: str, message: str) -> web.Response:
    return web.json_response({"format": FORMAT, "error": {"kind": kind, "message": message}}, status=status)


def _json(answer: dict[str, Any]) -> web.Response:
    return web.json_response({"format": FORMAT, **answer})
