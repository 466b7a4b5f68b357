"""The engine's side of HTTP: framing taken off wherever reads cut it, and heads that are refused."""

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mansard.serving.router_engine import ChunkDecoder, parse_head


def chunked(chunks: list[bytes], end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%X;ext=1\r\n%s\r\n" % (len(c), c) for c in chunks) + end


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted({p % (len(data) + 1) for p in places}), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.binary(min_size=1, max_size=40), max_size=8), st.lists(st.integers(0, 10_000), max_size=12))
def test_the_payload_does_not_depend_on_where_reads_cut_it(chunks: list[bytes], places: list[int]) -> None:
    decoder = ChunkDecoder()
    pieces = cut(chunked(chunks, b"0\r\nx-trailer: 1\r\n\r\n"), places)
    payload = [part for piece in pieces for part in decoder.feed(piece)]
    assert b"".join(payload) == b"".join(chunks)
    assert decoder.is_done


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=4), st.integers(0, 10_000))
def test_a_body_that_breaks_off_is_not_done(chunks: list[bytes], place: int) -> None:
    data = chunked(chunks)
    decoder = ChunkDecoder()
    decoder.feed(data[: place % len(data)])
    assert not decoder.is_done


@pytest.mark.parametrize(
    "data", [b"\r\n", b"-1\r\n", b"0x2\r\nab\r\n", b"2\r\nabc\r\n", b"2\nab\r\n", b"0\r\n\r\nmore", b"f" * 2000]
)
def test_bad_framing_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="chunk"):
        ChunkDecoder().feed(data)


def test_a_head_keeps_end_to_end_headers_only() -> None:
    head = parse_head(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
        b"Connection: keep-alive\r\nKeep-Alive: timeout=5\r\nX-Request-Id: a"
    )
    assert head.headers == ((b"content-type", b"text/event-stream"), (b"x-request-id", b"a"))
    assert (head.is_event_stream, head.is_chunked, head.length, head.is_kept_alive) == (True, True, None, True)


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
    assert parse_head(head).is_kept_alive is is_kept_alive


@pytest.mark.parametrize(
    "head",
    [
        *(b"HTTP/2 200 OK", b"HTTP/1.1", b"HTTP/1.1 20 OK", b"HTTP/1.1 abc OK", b"SSH-2.0-OpenSSH 200"),
        *(b"HTTP/1.1 200 OK\r\nno colon", b"HTTP/1.1 200 OK\r\n: x", b"HTTP/1.1 200 OK\r\nname : x"),
        *(b"HTTP/1.1 200 OK\r\ncontent-length: x", b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip"),
        *(b"HTTP/1.1 200 OK\r\ncontent-length: -1", b"HTTP/1.1 200 OK\r\ncontent-length: 1_0"),
    ],
)
def test_a_head_that_is_not_http_is_refused(head: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_head(head)
