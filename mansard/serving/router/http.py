"""aiohttp's low-level server as the router uses it, for users and on its admin socket.

Guarantees: a malformed request gets an error in the OpenAI API's form and reaches no handler, one log line at most and
no words of ours about our software; a client that goes away cancels its handler; a connection whose next request is not
there in `idle_seconds`, headers whole, is closed, and so is one above MAX_CONNECTIONS. Bodies stay compressed here.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from aiohttp import HttpVersion10, HttpVersion11, web

from mansard.serving.router.policy import error_body

MAX_CONNECTIONS = 8192
IDLE_SECONDS = 30.0
"""The OpenAI client's own pool gives idle connections up earlier (5 s)."""

log = logging.getLogger("mansard.router")


class HardenedServer(web.Server):
    """A factory of connections. aiohttp calls `handle_error` on the connection's class; there is no other hook."""

    def __init__(
        self, handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]], idle_seconds: float = IDLE_SECONDS
    ) -> None:
        self._handler = handler
        super().__init__(self._known_version, handler_cancellation=True)
        self._idle_seconds = idle_seconds

    def _known_version(self, request: web.BaseRequest) -> Awaitable[web.StreamResponse]:
        """aiohttp takes any version number that a client writes, and would answer in it."""
        if request._version in (HttpVersion11, HttpVersion10):  # `version` would stay as it is read first
            return self._handler(request)
        request._version = HttpVersion11
        return _refuse_version()

    def __call__(self) -> web.RequestHandler:
        return _Connection(
            self,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]  # None switches it off, its type says otherwise
            auto_decompress=False,
            keepalive_timeout=self._idle_seconds,
        )


async def _refuse_version() -> web.StreamResponse:
    return _error_response("invalid_request_error", "HTTP/1.1 is spoken here", 400)


def _error_response(kind: str, words: str, status: int) -> web.Response:
    body, headers = error_body(kind, words, status), {"server": "mansard"}
    response = web.Response(body=body, status=status, content_type="application/json", headers=headers)
    response.force_close()
    return response


class _Connection(web.RequestHandler):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self._manager is not None
        if len(self._manager.connections) > MAX_CONNECTIONS:
            self.force_close()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        if status >= 500:
            log.error("a request failed here: %s %s", request.method, request.raw_path[:200], exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is under way already")
        kind, words = ("invalid_request_error", "not a well-formed HTTP request")
        if status >= 500:
            kind, words = ("server_error", "the router failed; its log says why")
        return _error_response(kind, words, status)
