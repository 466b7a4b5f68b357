"""One client's connection: aiohttp's, with limits that hold until the last byte is read and sent.

Guarantees: a body in chunks may have MAX_FRAMING_BYTES and an eighth of its length of framing, so the cost of parsing
is bounded by what it brings; after an answer that ends a connection nothing is parsed any more, and little is read
(so that the client gets the answer and no reset); what is not taken for `write_seconds` closes the connection. Not
covered: what the kernel holds of an answer (sockets.py bounds it).

On aiohttp's connection and not on a server of our own or another's: its parser is the hardened one, and it hands each
read and each full buffer to methods that can be extended (uvicorn and hypercorn count no chunks either).
"""

import asyncio
import time
from typing import TYPE_CHECKING, cast

from aiohttp import StreamReader, web

from mansard.serving.router.policy import Refused, error_body

if TYPE_CHECKING:
    from mansard.serving.router.http import HardenedServer

PIECE_BYTES = 16 * 1024
"""Fed to the parser at a time where chunks may come: 2,700 of one byte, 2 ms."""
MAX_FRAMING_BYTES = 16 * 1024
LINGER_SECONDS = 1.0
MAX_DISCARDED_BYTES = 256 * 1024
_BUSY = error_body("service_unavailable", "no connection is free; try again", 503)
BUSY_ANSWER = (
    b"HTTP/1.1 503 Service Unavailable\r\nserver: mansard\r\nretry-after: 2\r\nconnection: close\r\n"
    b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(_BUSY), _BUSY)
)


class Connection(web.RequestHandler):
    """`stalled_since` is when its client stopped to take what it is sent (monotonic)."""

    def __init__(self, server: "HardenedServer", idle_seconds: float, write_seconds: float) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]  # None switches it off, its type says otherwise
            auto_decompress=False,
            keepalive_timeout=idle_seconds,
            lingering_time=0.0,
        )
        self.stalled_since: float | None = None
        self.address = ""
        self._server = server
        self._write_seconds = write_seconds
        self._write_timer: asyncio.TimerHandle | None = None
        self._unsent_bytes = 0
        self._is_discarding = False
        self._discarded_bytes = 0
        self._body: StreamReader | None = None
        self._body_bytes = 0
        self._length: int | None = None
        self._framing_bytes = 0
        self._unparsed = b""

    # coming and going

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        stream = cast(asyncio.Transport, transport)  # uvloop's is none
        stream.set_write_buffer_limits(high=0)  # paused means that something waits; else a remnant has no deadline
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")
        self.address = str(peer[0]) if isinstance(peer, tuple) else ""
        if not self._server.arrived(self):
            stream.write(BUSY_ANSWER)
            self.end_reading()
            self._loop.call_later(LINGER_SECONDS, self.cut_off)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._server.departed(self)
        if self._write_timer is not None:
            self._write_timer.cancel()
        self.stalled_since = None
        super().connection_lost(exc)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        finished = await super().finish_response(request, resp, start_time)
        self._server.rests(self)
        return finished

    def cut_off(self) -> None:
        """Close at once; its request is cancelled, and with it the engine's work."""
        if self.transport is not None:
            self.transport.abort()

    def end_reading(self) -> None:
        """Parse nothing more; the client sees the end of what was sent."""
        self._is_discarding = True
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write_eof()

    # what comes

    def data_received(self, data: bytes) -> None:
        if self._is_discarding:
            self._discarded_bytes += len(data)
            if self._discarded_bytes > MAX_DISCARDED_BYTES:
                self._pause_transport_reading()  # the kernel's buffer fills, and the client waits for its end
            return
        if self._unparsed:
            data, self._unparsed = self._unparsed + data, b""
        if len(data) <= PIECE_BYTES or len(data) <= self._plain_bytes():
            super().data_received(data)
            self._count(len(data))
            return
        for begin in range(0, len(data), PIECE_BYTES):
            piece = data[begin : begin + PIECE_BYTES]
            super().data_received(piece)
            self._count(len(piece))
            if self._is_discarding or self._close or self._force_close:
                return
            if self._reading_paused:  # until somebody has read of the body; aiohttp then calls this with nothing
                self._unparsed = data[begin + PIECE_BYTES :]
                return

    def _plain_bytes(self) -> int:
        """What is still to come of a body with a length."""
        body = self._body
        return 0 if body is None or self._length is None or body.is_eof() else self._length - body.total_bytes

    def _count(self, num_bytes: int) -> None:
        if self._messages and self._messages[-1][1] is not self._body:
            message, self._body = self._messages[-1]
            headers = getattr(message, "headers", {})
            self._length = None if getattr(message, "chunked", True) else int(headers.get("content-length", 0))
            self._body_bytes, self._framing_bytes = self._body.total_bytes, 0
            return
        body = self._body
        if body is None or self._length is not None or body.is_eof():
            return
        self._framing_bytes += num_bytes - body.total_bytes + self._body_bytes
        self._body_bytes = body.total_bytes
        if not self._reading_paused and self._framing_bytes > MAX_FRAMING_BYTES + self._body_bytes // 8:
            self._is_discarding = True
            problem = f"{self._body_bytes} bytes in too many chunks; send larger ones, or a content-length"
            body.set_exception(Refused(400, "invalid_request_error", problem))

    # what goes

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stalled_since = time.monotonic()
        if self._write_timer is None:
            self._watch_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.stalled_since = None

    def _watch_writing(self) -> None:
        """One timer for as long as something waits again and again; it costs nothing between two looks."""
        assert self.transport is not None
        self._unsent_bytes = self.transport.get_write_buffer_size()
        self._write_timer = self._loop.call_later(self._write_seconds, self._look_at_writing, self.stalled_since)

    def _look_at_writing(self, since: float | None) -> None:
        self._write_timer = None
        if self.transport is None or self.stalled_since is None:
            return
        if self.stalled_since == since and self.transport.get_write_buffer_size() >= self._unsent_bytes:
            self._server.num_cut_off += 1
            self.cut_off()
        else:
            self._watch_writing()


async def send_whole(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """Until the kernel has the last byte. What is sent already is not sent again."""
    await response.prepare(request)
    await response.write_eof()
    connection = request.protocol
    if connection.writing_paused:
        await connection._drain_helper()


async def send_last(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """An answer after which nothing of the connection is read; it stays a moment, as closing at once would reset it."""
    connection = request.protocol
    assert isinstance(connection, Connection)
    connection._is_discarding = True
    response.force_close()
    await send_whole(request, response)
    connection.end_reading()
    connection._server.rests(connection)
    await asyncio.sleep(LINGER_SECONDS)
