"""The thin client against a small HTTP server on a Unix socket."""

import contextlib
import http.server
import json
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mansard.errors import BadInput, Conflict, MansardError, NotAllowed
from mansard.serving.client import HostClient, HostDown


@contextlib.contextmanager
def answering(path: Path, status: int, answer: bytes | None) -> Iterator[list[Any]]:
    """A server that gives every request the same answer (None: closes without one), and notes what it was asked."""
    asked: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("content-length", "0"))
            asked.append((self.command, self.path, json.loads(self.rfile.read(length) or b"null")))
            if answer is not None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(answer)

        do_POST = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

        def address_string(self) -> str:
            return "unix"

    with socketserver.UnixStreamServer(str(path), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield asked
        finally:
            server.shutdown()
            thread.join()


def test_a_call_carries_the_format_and_returns_the_json(tmp_path: Path) -> None:
    with answering(tmp_path / "s", 200, b'{"changed": true}') as asked:
        client = HostClient(tmp_path / "s")
        assert client.call("POST", "/rollback", {"model": "tiny"}) == {"changed": True}
        assert client.call("GET", "/status") == {"changed": True}
    assert asked == [("POST", "/rollback", {"format": 1, "model": "tiny"}), ("GET", "/status", None)]


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (403, b'{"error": {"kind": "NotAllowed", "message": "no"}}', NotAllowed),
        (409, b'{"error": {"kind": "Conflict", "message": "no"}}', Conflict),
        (409, b'{"error": {"kind": "Unknown", "message": "no"}}', Conflict),
        (400, b'{"error": {"kind": "BadInput", "message": "no"}}', BadInput),
        (500, b'{"error": {"kind": "KeyError", "message": "no"}}', MansardError),
        (500, b'{"error": "no"}', MansardError),
        (404, b"{}", BadInput),
        (200, b"not JSON", MansardError),
        (200, b"[]", MansardError),
    ],
)
def test_an_error_is_raised_as_the_class_it_names(tmp_path: Path, status: int, body: bytes, kind: type) -> None:
    with answering(tmp_path / "s", status, body), pytest.raises(kind) as caught:
        HostClient(tmp_path / "s").call("GET", "/status")
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def test_nobody_listening_is_host_down(tmp_path: Path) -> None:
    with pytest.raises(HostDown, match="mansard up"):
        HostClient(tmp_path / "none").call("GET", "/status")
    with answering(tmp_path / "s", 200, b"{}"):
        pass
    with pytest.raises(HostDown, match="mansard up"):
        HostClient(tmp_path / "s").call("GET", "/status")


def test_a_host_that_dies_before_it_answers_is_host_down(tmp_path: Path) -> None:
    with answering(tmp_path / "s", 200, None), pytest.raises(HostDown):
        HostClient(tmp_path / "s").call("GET", "/status")
