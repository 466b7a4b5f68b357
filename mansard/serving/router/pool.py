"""Connections to the engines, kept between requests, and one request on one of them.

Guarantees: a kept connection that an engine closed meanwhile is no failure of the engine; a request whose client went
away is not left running. Not covered: how many connections an engine takes (queue.py bounds the requests).
"""

import asyncio
from urllib.parse import urlsplit

from mansard.serving.router.engine_connection import EngineConnection, EngineFailed, EngineHead

CONNECT_TIMEOUT_SECONDS = 5.0
IDLE_SECONDS = 4.0
"""Idle connections are dropped before uvicorn, which vLLM runs on, closes them (after 5 s by default)."""


class EnginePool:
    """Idle connections per endpoint, the latest used first. An answer's first byte may take `first_byte_seconds`."""

    def __init__(self, first_byte_seconds: float) -> None:
        self._first_byte_seconds = first_byte_seconds
        self._idle: dict[str, list[EngineConnection]] = {}

    async def ask(self, endpoint: str, request: bytes) -> tuple[EngineConnection, EngineHead]:
        """A connection on which `request` was sent, and the answer's head. Raises EngineFailed.

        A kept connection that turns out to be closed before any byte came back says nothing about the engine
        (uvicorn closes idle ones), so the request is sent once more on a new one.
        """
        loop = asyncio.get_running_loop()
        idle = self._idle.get(endpoint, [])
        while idle:
            connection = idle.pop()
            if not connection.is_reusable or loop.time() - connection.idle_since > IDLE_SECONDS:
                connection.abort()
                continue
            try:
                return connection, await self._exchange(connection, request)
            except EngineFailed:
                if connection.has_answered:
                    raise
                break
        connection = await _connect(endpoint)
        return connection, await self._exchange(connection, request)

    def put_back(self, endpoint: str, connection: EngineConnection) -> None:
        """The answer was read to its end, or is not wanted: keep the connection if it can be used again."""
        head = connection.head
        if head is None or not head.is_kept_alive or not connection.is_reusable:
            connection.abort()
            return
        connection.idle_since = asyncio.get_running_loop().time()
        self._idle.setdefault(endpoint, []).append(connection)

    def keep_only(self, endpoints: set[str]) -> None:
        """Close idle connections to engines that are no longer resident."""
        for endpoint in self._idle.keys() - endpoints:
            for connection in self._idle.pop(endpoint):
                connection.abort()

    async def _exchange(self, connection: EngineConnection, request: bytes) -> EngineHead:
        connection.allow(self._first_byte_seconds)
        try:
            return await connection.exchange(request)
        except BaseException:  # also when the client went away: the engine must not go on for nobody
            connection.abort()
            raise


async def _connect(endpoint: str) -> EngineConnection:
    parts = urlsplit(endpoint)
    if parts.hostname is None or parts.port is None:
        raise EngineFailed(f"{endpoint}: not http://HOST:PORT")
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
            _, connection = await loop.create_connection(EngineConnection, parts.hostname, parts.port)
    except TimeoutError as error:
        raise EngineFailed(f"{endpoint}: no connection within {CONNECT_TIMEOUT_SECONDS:g} s") from error
    except OSError as error:
        raise EngineFailed(f"{endpoint}: cannot connect: {error.strerror or error}") from error
    return connection
