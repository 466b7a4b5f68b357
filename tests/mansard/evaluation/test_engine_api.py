"""An engine is asked what it serves before its answers are believed."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from mansard.errors import MansardError, StageFailed
from mansard.evaluation.engine_api import check_serves, get_json

ARTIFACT, OTHER = "a" * 64, "b" * 64


@contextmanager
def engine(pages: dict[str, Any], status: int = 200) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = json.dumps(pages[self.path]).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def pages(root: str = f"/store/trees/{ARTIFACT}", length: int = 512) -> dict[str, Any]:
    card = {"id": "demo", "root": root, "max_model_len": length}
    return {"/v1/models": {"data": [card]}, "/version": {"version": "0.32.0"}}


def test_engine_that_serves_the_artifact_is_believed() -> None:
    with engine(pages()) as endpoint:
        assert check_serves(endpoint, "demo", ARTIFACT, 512) == "0.32.0"


def test_folder_without_a_snapshot_id_is_believed_by_name() -> None:
    with engine(pages(root="/models/demo")) as endpoint:
        assert check_serves(endpoint, "demo", ARTIFACT, 512) == "0.32.0"


@pytest.mark.parametrize(
    ("name", "artifact", "length", "words"),
    [
        ("other", ARTIFACT, 512, "serves demo, not 'other'"),
        ("demo", OTHER, 512, "serves artifact aaaaaaaaaaaa, not bbbbbbbbbbbb"),
        ("demo", ARTIFACT, 1024, "takes 512 tokens, the spec's serve.max_model_len is 1024"),
    ],
)
def test_engine_that_serves_something_else_is_refused(name: str, artifact: str, length: int, words: str) -> None:
    with engine(pages()) as endpoint, pytest.raises(StageFailed, match=words):
        check_serves(endpoint, name, artifact, length)


def test_refusal_shows_status_and_words() -> None:
    with engine(pages(), status=503) as endpoint, pytest.raises(MansardError, match=r"GET .*/version answered 503"):
        get_json(endpoint, "/version")


@pytest.mark.parametrize("endpoint", ["localhost:1", "https://h:1", "http://h", "unix:/x"])
def test_endpoint_that_is_no_address_is_refused(endpoint: str) -> None:
    with pytest.raises(MansardError, match="http://HOST:PORT is expected"):
        get_json(endpoint, "/version")


def test_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with engine(pages()) as endpoint:
        assert get_json(endpoint, "/version") == {"version": "0.32.0"}
