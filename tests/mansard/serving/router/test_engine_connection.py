"""The engine's side of HTTP: bodies wherever reads cut them, and answers that are refused."""

import asyncio
import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mansard.serving.router.engine_connection import MAX_HEAD_BYTES, EngineConnection, EngineFailed, EngineHead

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
QUIET = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Wire(asyncio.Transport):
    """The other end of a connection: what was sent, and whether it was broken off."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.is_aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent += bytes(data)

    def abort(self) -> None:
        self.is_aborted = True

    def is_closing(self) -> bool:
        return self.is_aborted

    def pause_reading(self) -> None:
        pass


def answer_of(pieces: list[bytes]) -> tuple[EngineHead, bytes, bool]:
    """What a reader gets from an engine that sends `pieces` and then goes away, and whether the connection was good
    for more until then. Raises EngineFailed."""

    async def ask() -> tuple[EngineHead, bytes, bool]:
        connection = EngineConnection()
        connection.connection_made(Wire())
        asking = asyncio.ensure_future(connection.exchange(b"GET / HTTP/1.1\r\n\r\n"))
        await asyncio.sleep(0)
        for piece in pieces:
            connection.data_received(piece)
        is_reusable = connection.is_reusable
        connection.connection_lost(None)
        head = await asking
        body = []
        while data := await connection.read():
            body.append(data)
        return head, b"".join(body), is_reusable

    return asyncio.run(ask())


def chunked(chunks: list[bytes], end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%X;ext=1\r\n%s\r\n" % (len(c), c) for c in chunks) + end


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted({p % (len(data) + 1) for p in places}), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges) if a < b]


@QUIET
@given(st.lists(st.binary(min_size=1, max_size=40), max_size=8), st.lists(st.integers(0, 10_000), max_size=12))
def test_the_payload_does_not_depend_on_where_reads_cut_it(chunks: list[bytes], places: list[int]) -> None:
    data = b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + chunked(chunks, b"0\r\nx-trailer: 1\r\n\r\n")
    head, body, is_reusable = answer_of(cut(data, places))
    assert (head.status, head.is_chunked, head.is_event_stream) == (200, True, True)
    assert body == b"".join(chunks)
    assert is_reusable


@QUIET
@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=4), st.integers(0, 10_000))
def test_a_body_that_breaks_off_is_a_failure(chunks: list[bytes], place: int) -> None:
    data = HEAD + chunked(chunks)
    with pytest.raises(EngineFailed, match="closed the connection"):
        answer_of([data[: place % len(data)]])


@pytest.mark.parametrize("data", [b"-1\r\n", b"0x2\r\nab\r\n", b"2\r\nabc\r\n"])
def test_bad_framing_is_refused(data: bytes) -> None:
    with pytest.raises(EngineFailed, match="bad HTTP"):
        answer_of([HEAD + data + b"x" * 100])


def test_a_head_keeps_end_to_end_headers_only() -> None:
    head, _, _ = answer_of(
        [
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\ncontent-length: 0\r\nDate: now\r\nServer: x\r\n"
            b"Connection: keep-alive\r\nKeep-Alive: timeout=5\r\nX-Request-Id: a\r\n\r\n"
        ]
    )
    assert head.headers == ((b"content-type", b"application/json"), (b"x-request-id", b"a"))
    assert (head.is_event_stream, head.is_chunked, head.length, head.is_kept_alive) == (False, False, 0, True)


@pytest.mark.parametrize(
    ("head", "is_kept_alive"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 0", True),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close", False),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 0", False),
        (b"HTTP/1.1 200 OK", False),
        (b"HTTP/1.1 204 No Content", True),
    ],
)
def test_a_connection_is_kept_only_where_the_end_of_the_body_is_known(head: bytes, is_kept_alive: bool) -> None:
    found, body, _ = answer_of([head + b"\r\n\r\n"])
    assert (found.is_kept_alive, body) == (is_kept_alive, b"")


def test_a_body_without_a_length_ends_with_the_connection() -> None:
    assert answer_of([b"HTTP/1.1 200 OK\r\n\r\nab", b"cd"])[1] == b"abcd"


@pytest.mark.parametrize(
    "head",
    [
        *(b"HTTP/9 200 OK", b"HTTP/1.1", b"HTTP/1.1 abc OK", b"SSH-2.0-OpenSSH 200"),
        *(b"HTTP/1.1 200 OK\r\nno colon", b"HTTP/1.1 200 OK\r\n: x", b"HTTP/1.1 200 OK\r\nname : x"),
        *(b"HTTP/1.1 200 OK\r\ncontent-length: x", b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip"),
        *(b"HTTP/1.1 200 OK\r\ncontent-length: -1", b"HTTP/1.1 200 OK\r\ncontent-length: 1_0"),
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2",
    ],
)
def test_an_answer_that_is_not_http_is_refused(head: bytes) -> None:
    with pytest.raises(EngineFailed, match="bad HTTP"):
        answer_of([head + b"\r\n\r\n"])


def test_a_head_without_an_end_is_refused() -> None:
    with pytest.raises(EngineFailed, match="more than"):
        answer_of([b"HTTP/1.1 200 OK\r\n", *[b"x: " + b"a" * 1000 + b"\r\n"] * (MAX_HEAD_BYTES // 1000 + 2)])


@pytest.mark.parametrize("more", [b"more", b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nbad", b"\r\n\0"])
@pytest.mark.parametrize("is_one_read", [True, False])
def test_bytes_after_an_answer_are_nobodys_and_end_the_connection(more: bytes, is_one_read: bool) -> None:
    whole = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nbody"
    head, body, is_reusable = answer_of([whole + more] if is_one_read else [whole, more])
    assert (head.status, body, is_reusable) == (200, b"body", False)
