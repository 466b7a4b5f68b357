"""Clients and engines that take everything: each gets its share and no more, until the last byte is sent."""

import contextlib
import hashlib
import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from mansard.serving.split import with_stable

pytestmark = pytest.mark.slow

CHUNKED = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
DEADLINE_SECONDS = 60.0


def received(client: socket.socket) -> bytes:
    """All until the other side closes or resets."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while data := client.recv(65536):
            parts.append(data)
    return b"".join(parts)


def post(prompt: str, is_streamed: bool = True, key: str = "") -> bytes:
    body = json.dumps({"model": "tiny", "prompt": prompt, "stream": is_streamed}).encode()
    credentials = f"authorization: Bearer {key}\r\n" if key else ""
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\n{credentials}content-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def connect_from(rig: Any, address: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", rig.port), DEADLINE_SECONDS, (address, 0))


def status_from(rig: Any, address: str) -> bytes:
    with connect_from(rig, address) as client:
        client.sendall(post("x", is_streamed=False).replace(b"host: x", b"host: x\r\nconnection: close"))
        return received(client)[9:12]


def keys_for(folder: Any, *names: str) -> str:
    lines = "".join(f'{name}: "{hashlib.sha256(name.encode()).hexdigest()}"\n' for name in names)
    (folder / "keys.yaml").write_text(lines)
    return "api_keys: keys.yaml\n"


def test_a_body_in_chunks_of_a_byte_is_refused_and_nothing_of_it_is_parsed_on(rig: Any) -> None:
    rig.write(None)
    before = rig.one.seen()["requests"]
    with rig.connect() as client:
        client.sendall(CHUNKED + b"1\r\nx\r\n" * 10_000)
        answer = received(client)  # ends although the client has not ended its body
    assert answer.startswith(b"HTTP/1.1 400") and b"too many chunks" in answer
    with rig.connect() as client:
        client.sendall(CHUNKED + b"1\r\nx\r\n" * 1_000 + b"0\r\n\r\n")
        assert client.recv(12) == b"HTTP/1.1 200"  # a client may write as it pleases, within bounds
    assert rig.one.seen()["requests"] == before + 1


def test_long_chunks_and_a_length_are_taken_to_the_limit_of_a_body(rig: Any) -> None:
    rig.write(None)
    for framing, body in (
        (b"transfer-encoding: chunked", (b"400\r\n" + b"x" * 1024 + b"\r\n") * 4000 + b"0\r\n\r\n"),
        (b"content-length: 4096000", b"x" * 4_096_000),
    ):
        with rig.connect() as client:
            client.sendall(CHUNKED.replace(b"transfer-encoding: chunked", framing) + body)
            assert client.recv(12) == b"HTTP/1.1 200"
        assert rig.one.seen()["headers"]["content-length"] == "4096000"


def test_a_refusal_before_the_body_ends_the_connection(tmp_path: Any, make_rig: Any) -> None:
    with make_rig(site_lines=keys_for(tmp_path, "acme")) as rig:
        rig.write(None)
        with rig.connect() as client:
            client.sendall(CHUNKED + b"1\r\nx\r\n" * 10)
            answer = received(client)
        assert answer.startswith(b"HTTP/1.1 401") and b"connection: close" in answer.lower()
        with rig.connect() as client:
            client.sendall(CHUNKED + b"0\r\n\r\n" + post("x", is_streamed=False, key="acme"))
            assert client.recv(12) == b"HTTP/1.1 401"  # its body was there: the connection goes on
            while b"HTTP/1.1 200" not in client.recv(65536):
                pass


def test_bodies_whose_last_byte_does_not_come_take_nobody_elses_memory(make_rig: Any) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 300000\r\n\r\n"
    with (
        make_rig("--max-held-bytes", "2000000", "--body-silent-seconds", "1.5") as rig,
        contextlib.ExitStack() as open_,
    ):
        rig.write(None)
        clients = [open_.enter_context(connect_from(rig, "127.0.0.2")) for _ in range(9)]
        for client in clients:
            client.sendall(head + b"x" * 299_000)
        rig.wait_until(lambda: rig.seen()["refused"].get("429", 0) >= 7, "their address' share to be full")
        assert rig.call(body=b"x" * 300_000).status == 200
        assert status_from(rig, "127.0.0.2") == b"200"  # a small one is taken of anybody
        statuses = sorted(received(client)[9:12] for client in clients)
        assert set(statuses) == {b"408", b"429"}  # who stops sending is let go
        rig.wait_until(lambda: rig.seen()["in_flight"] == 0, "all to end")


def test_large_whole_answers_that_nobody_reads_are_not_held(make_rig: Any) -> None:
    with make_rig() as rig, contextlib.ExitStack() as clients:
        rig.write(None)
        for _ in range(20):
            client = clients.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", rig.port))
            client.sendall(post("/large", is_streamed=False))
        rig.wait_until(lambda: rig.seen()["in_flight"] == 20, "all to be under way")
        read = rig.call(body=b'{"model": "tiny", "prompt": "/large"}')  # whoever reads gets it all meanwhile
        assert len(read.body) > 16_000_000
        assert rig.one.seen()["in_flight"] == 20
        assert rig.call().status == 200
        status = Path(f"/proc/{rig.worker.pid}/status").read_text()
        peak = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert peak is not None and int(peak[1]) < 200_000
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        assert len(client.recv(100_000_000, socket.MSG_PEEK)) > 0


def test_an_answer_that_is_not_read_ends_and_its_place_is_free(make_rig: Any) -> None:
    with make_rig("--write-seconds", "0.5", "--max-running", "1", "--max-waiting", "1") as rig, rig.connect() as client:
        rig.write(None)
        client.sendall(post("/endless"))
        rig.wait_until(lambda: rig.seen()["in_flight"] == 1, "the stream")
        rig.wait_until(lambda: rig.seen()["in_flight"] == 0, "its end")
        assert rig.call().status == 200
        assert rig.counts(1)["cancelled"] == 1
        rig.wait_until(lambda: rig.one.seen()["in_flight"] == 0, "the engine to be let off")


def test_whoever_needs_a_place_gets_that_of_an_answer_that_nobody_reads(make_rig: Any) -> None:
    with make_rig("--max-running", "1", "--max-waiting", "0") as rig, rig.connect() as client:
        rig.write(None)
        client.sendall(post("/endless"))
        rig.wait_until(lambda: rig.seen()["in_flight"] == 1, "the stream")
        rig.wait_until(lambda: rig.call().status == 200, "its place")
        received(client)


@pytest.mark.parametrize("has_keys", [True, False])
def test_one_owner_cannot_have_all_places(tmp_path: Any, make_rig: Any, has_keys: bool) -> None:
    lines = keys_for(tmp_path, "acme", "beta") if has_keys else ""
    with (
        make_rig("--max-running", "10", "--max-waiting", "10", site_lines=lines) as rig,
        contextlib.ExitStack() as clients,
    ):
        rig.write(None)
        for _ in range(30):
            client = clients.enter_context(connect_from(rig, "127.0.0.2"))
            client.sendall(post("/slow", key="acme" if has_keys else ""))
        rig.wait_until(lambda: rig.one.seen()["in_flight"] == 8, "its share of places")
        rig.wait_until(lambda: rig.seen()["refused"].get("429", 0) == 14, "its share of those that wait")
        reply = rig.call(authorization="Bearer beta") if has_keys else rig.call()
        assert reply.status == 200


def test_a_connection_that_rests_makes_room_and_where_none_rests_503_is_told(make_rig: Any) -> None:
    with make_rig("--max-connections", "5") as rig, contextlib.ExitStack() as clients:
        rig.write(None)
        idle = [clients.enter_context(connect_from(rig, "127.0.0.2")) for _ in range(20)]
        rig.wait_until(lambda: rig.call().status == 200, "a place among them")
        assert received(idle[0]) == b""  # the oldest went
        rig.one.behave(fail="hang")
        for _ in range(5):
            clients.enter_context(rig.connect()).sendall(post("x"))
        rig.wait_until(lambda: rig.seen()["in_flight"] == 5, "all to be busy")
        with rig.connect() as client:
            answer = received(client)
        assert answer.startswith(b"HTTP/1.1 503") and b"retry-after: 2" in answer


@pytest.mark.parametrize("prompt", ["/silent", "/head-only", "/two-tokens", "/drip"])
@pytest.mark.parametrize("is_whole", [True, False])
def test_an_engine_that_stalls_has_failed_and_the_user_is_told(make_rig: Any, prompt: str, is_whole: bool) -> None:
    limits = ("--first-byte-seconds", "0.4", "--silent-seconds", "0.4", "--max-running", "1", "--max-waiting", "0")
    with make_rig(*limits) as rig, rig.connect() as client:
        rig.write(None)
        client.sendall(post(prompt, is_streamed=not is_whole))
        data = b""
        while b'"error"' not in data:
            part = client.recv(65536)
            assert part, data
            data += part
        assert b"stalls" in data or data.startswith(b"HTTP/1.1 503")
        rig.wait_until(lambda: rig.seen()["in_flight"] == 0, "the place to be free")
        assert (rig.call().status, rig.counts(1)["errors"]) == (200, 1)
        rig.wait_until(lambda: rig.one.seen()["in_flight"] == 0, "the engine to be let off")


def test_an_engine_that_is_slow_but_works_is_waited_for(make_rig: Any) -> None:
    with make_rig("--silent-seconds", "0.4") as rig, rig.connect() as client:
        rig.write(None)
        client.sendall(post("/slow"))
        data = b""
        while data.count(b"data: ") < 15:
            data += client.recv(65536)
        assert b"error" not in data


def test_clients_that_leave_under_way_are_counted_and_leave_no_line(make_rig: Any, capfd: Any) -> None:
    with make_rig() as rig:
        rig.write(None)
        for number in range(20):
            with rig.connect() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # its end is a reset
                client.sendall(post("/large" if number % 2 else "/endless", is_streamed=not number % 2))
                client.recv(1)
        rig.wait_until(lambda: rig.seen()["clients_left"] == 20, "all to be gone")
        assert rig.seen()["in_flight"] == 0
    assert "Traceback" not in capfd.readouterr().err


def test_a_models_name_in_the_middle_of_megabytes_is_read_without_parsing_them(rig: Any) -> None:
    both = rig.write(None)
    rig.put(with_stable(both, "other", 7, rig.two.endpoint, "other", next(rig.terms)))
    filler = ", ".join(['{"model": "tiny", "text": "\\"model\\": \\"tiny\\""}'] * 6_000)
    body = f'{{"messages": [{filler}], "model": "other", "tools": [{filler}]}}'
    reply = rig.call(body=body.encode())
    assert (reply.status, reply.text) == (200, "two")
    assert rig.call(body=body.replace('"model": "other"', '"m": 1').encode()).status == 404
