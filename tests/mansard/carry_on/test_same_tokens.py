"""A node with another tokenizer is found before its states are taken."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mansard.carry_on.same_tokens import check_tokens
from mansard.errors import BadInput
from mansard.models.loading import load_tokenizer

TEXT = "word0 word1 word2 ünd"


@pytest.fixture
def nodes() -> Iterator[Any]:
    """nodes(answer) -> the endpoint of a server whose /tokenize answers `answer(body)`; None: it has no such path."""
    running: list[ThreadingHTTPServer] = []

    def start(answer: Any) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                data = b"" if answer is None else json.dumps({"tokens": answer(body)}).encode()
                self.send_response(404 if answer is None or self.path != "/tokenize" else 200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def test_a_node_with_another_tokenizer_is_refused(nodes: Any, base_folder: Path) -> None:
    tokenizer = load_tokenizer(base_folder)
    seen = tokenizer(TEXT)["input_ids"]  # with special tokens, as a sequence of a capture has them

    def honest(body: dict[str, Any]) -> list[int]:
        assert (body["model"], body["add_special_tokens"]) == ("base", False)
        found: list[int] = tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
        return found

    check_tokens(nodes(honest), "base", tokenizer, seen)
    check_tokens(nodes(None), "base", tokenizer, seen)
    with pytest.raises(BadInput, match=r"has another tokenizer than the base: 'word0 .* is \d+ tokens that begin with"):
        check_tokens(nodes(lambda body: [t + 1 for t in honest(body)]), "base", tokenizer, seen)
    with pytest.raises(BadInput, match=r"is None to it, .*; name nodes of the base") as refused:
        check_tokens(nodes(lambda body: None), "base", tokenizer, seen)
    assert "\n" not in str(refused.value)
