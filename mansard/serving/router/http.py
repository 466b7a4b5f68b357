"""aiohttp's low-level server as the router uses it, for users and on its admin socket.

Guarantees: a malformed request gets an error in the OpenAI API's form and reaches no handler, one log line at most and
no words of ours about our software; a client that goes away cancels its handler, without a line; a connection whose
next request is not there in `idle_seconds`, headers whole, is closed. Above `max_connections` the one that has been
idle for longest goes, of the address that has most; where none is idle the newcomer gets 503. Bodies stay compressed
here. What holds for one connection: connection.py.
"""

import logging
from collections.abc import Awaitable, Callable

from aiohttp import HttpVersion10, HttpVersion11, web

from mansard.serving.router.connection import Connection
from mansard.serving.router.policy import error_body

MAX_CONNECTIONS = 8192
IDLE_SECONDS = 30.0
"""The OpenAI client's own pool gives idle connections up earlier (5 s)."""
WRITE_SECONDS = 20.0
SPARE_CONNECTIONS = 64
"""Above the limit: those that are told so."""

log = logging.getLogger("mansard.router")


class HardenedServer(web.Server):
    """A factory of connections. aiohttp calls `handle_error` on the connection's class; there is no other hook."""

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        idle_seconds: float = IDLE_SECONDS,
        write_seconds: float = WRITE_SECONDS,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        self._handler = handler
        super().__init__(self._known_version, handler_cancellation=True)
        self._idle_seconds = idle_seconds
        self._write_seconds = write_seconds
        self._max_connections = max_connections
        self._idle: dict[str, dict[Connection, None]] = {}
        self.num_cut_off = 0
        """Connections whose client did not take what it was sent."""

    def _known_version(self, request: web.BaseRequest) -> Awaitable[web.StreamResponse]:
        """aiohttp takes any version number that a client writes, and would answer in it."""
        connection = request.protocol
        assert isinstance(connection, Connection)
        self._works(connection)
        if request._version in (HttpVersion11, HttpVersion10):  # `version` would stay as it is read first
            return self._handler(request)
        request._version = HttpVersion11
        return _refuse_version()

    def __call__(self) -> web.RequestHandler:
        return _Connection(self, self._idle_seconds, self._write_seconds)

    def arrived(self, connection: Connection) -> bool:
        """Whether there is room for it; the oldest idle one may have to go."""
        excess = len(self.connections) - self._max_connections
        if excess > 0 and not self._drop_idle():
            if excess > SPARE_CONNECTIONS:
                connection.cut_off()
            return False
        self.rests(connection)
        return True

    def rests(self, connection: Connection) -> None:
        """It waits for its next request, or for its end."""
        if connection.transport is not None:
            self._idle.setdefault(connection.address, {})[connection] = None

    def departed(self, connection: Connection) -> None:
        self._works(connection)

    def _works(self, connection: Connection) -> None:
        idle = self._idle.get(connection.address)
        if idle is not None and connection in idle:
            del idle[connection]
            if not idle:
                del self._idle[connection.address]

    def _drop_idle(self) -> bool:
        if not self._idle:
            return False
        idle = max(self._idle.values(), key=len)
        oldest = next(iter(idle))
        self._works(oldest)
        oldest.cut_off()
        return True


async def _refuse_version() -> web.StreamResponse:
    return _error_response("invalid_request_error", "HTTP/1.1 is spoken here", 400)


def _error_response(kind: str, words: str, status: int) -> web.Response:
    body, headers = error_body(kind, words, status), {"server": "mansard"}
    response = web.Response(body=body, status=status, content_type="application/json", headers=headers)
    response.force_close()
    return response


class _Connection(Connection):
    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        if isinstance(exc, ConnectionError):  # the client went away
            raise exc
        if status >= 500:
            log.error("a request failed here: %s %s", request.method, request.raw_path[:200], exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is under way already")
        kind, words = ("invalid_request_error", "not a well-formed HTTP request")
        if status >= 500:
            kind, words = ("server_error", "the router failed; its log says why")
        return _error_response(kind, words, status)
