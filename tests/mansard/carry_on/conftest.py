"""A small base with a tokenizer and text in a store, and inference nodes that give its states away over HTTP."""

import json
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mansard.records import SnapshotId
from mansard.store.store import Store

SHAPE = {"vocabulary": 300, "hidden": 128, "intermediate": 256, "blocks": 2, "heads": 2, "max_tokens": 128}
DATA: dict[str, Any] = {
    "sequence_tokens": 32,
    "min_domain_fraction": 0.3,
    "seed": 0,
    "sources": [
        {"name": "code", "train": "c", "held_out": "c", "weight": 0.7, "is_domain": True},
        {"name": "prose", "train": "p", "held_out": "p", "weight": 0.3, "is_domain": False},
    ],
}
ROWS = {name: {"train": 12, "held_out": 4} for name in ("code", "prose")}
SERVE = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True, "tensor_parallel": 1}


def texts(word: str, documents: int) -> list[str]:
    return [f"{word} {i}: " + " ".join(f"{word}{(i * 7 + j) % 23}" for j in range(40)) for i in range(documents)]


def jsonl(documents: list[str]) -> bytes:
    return "".join(json.dumps({"text": t, "file": f"{i}.py"}) + "\n" for i, t in enumerate(documents)).encode()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mansard.demo.base import save_base, train_tokenizer, untrained_model

    folder = tmp_path_factory.mktemp("base")
    save_base(untrained_model(SHAPE, 0), train_tokenizer(texts("word", 20), SHAPE["vocabulary"], 64), folder)
    return folder


@pytest.fixture(scope="session")
def base_model(base_folder: Path) -> Any:
    import torch

    from mansard.models.loading import load_model

    return load_model(base_folder, torch.float32)


@dataclass
class Filled:
    """A store with the base and the text; `inputs` are those of stage `capture`."""

    store: Store
    base: SnapshotId
    inputs: dict[str, SnapshotId]


@pytest.fixture
def filled(base_folder: Path, store: Store) -> Filled:
    base = store.snapshot(base_folder)
    inputs = {"artifact": base}
    for name in ("code", "prose"):
        inputs[f"data.{name}.train"] = store.put_files({"data.jsonl": jsonl(texts(name, 30))})
        inputs[f"data.{name}.held_out"] = store.put_files({"data.jsonl": jsonl(texts(name, 40)[30:])})
    return Filled(store, base, inputs)


@dataclass
class StatesServer:
    """What a vLLM node says, in pooling mode and (`/v1/completions`, `/states/KEY`) serving users, computed by
    transformers. `asked` counts sequences; it dies after `dies_after` requests, and then answers nothing."""

    endpoint: str
    asked: list[int] = field(default_factory=list)
    dies_after: int | None = None
    root: str = "/models/base"
    scale: float = 1.0
    taps: tuple[int, ...] = ()
    tells_taps: bool = True
    cut: Callable[[str], list[int]] = lambda text: []  # into tokens
    gives_states: bool = True
    lost_tokens: int = 0
    lost_bytes: int = 0
    quantization: str | None = None
    """What the plugin's card says; a node without the plugin says nothing."""
    waiting: dict[str, tuple[bytes, str]] = field(default_factory=dict)

    def keep(self, model: Any, body: dict[str, Any]) -> dict[str, Any]:
        """One answer of a serving node: its states wait under a key."""
        prompt = body["prompt"][: len(body["prompt"]) - self.lost_tokens]
        data, metadata = self.states(model, {"input": [prompt]})
        key = uuid.uuid4().hex
        shape = ",".join(map(str, metadata["data"][0]["shape"]))
        self.waiting[key] = (data[: len(data) - self.lost_bytes], shape)
        port = int(self.endpoint.rsplit(":", 1)[1])
        given = {"kv_transfer_params": {"mansard_states": {"port": port, "key": key}}} if self.gives_states else {}
        return {"choices": [{"text": "x"}], **given}

    def states(self, model: Any, body: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        import torch

        data, items = b"", []
        for index, tokens in enumerate(body["input"]):
            with torch.no_grad():
                given = model.model(input_ids=torch.tensor([tokens]), output_hidden_states=True)
            states = [given.last_hidden_state, *(given.hidden_states[tap] for tap in self.taps)]
            found = torch.cat(states, dim=-1)[0] * self.scale
            raw = found.to(torch.bfloat16).view(torch.int16).numpy().astype("<i2").tobytes()
            items.append({"index": index, "start": len(data), "end": len(data) + len(raw), "shape": list(found.shape)})
            data += raw
        return data, {"data": items}


class _Server(ThreadingHTTPServer):
    request_queue_size = 512  # as vLLM: a serving node is asked for each sequence on its own


ServeStates = Callable[..., StatesServer]


@pytest.fixture
def serve_states(base_model: Any, base_folder: Path) -> Iterator[ServeStates]:
    """serve_states(dies_after=None, root=..., scale=1.0, taps=(), model=the base) -> a node that serves."""
    from mansard.models.loading import load_tokenizer

    running: list[ThreadingHTTPServer] = []
    tokenizer = load_tokenizer(base_folder)

    def start(
        dies_after: int | None = None,
        root: str = "/models/base",
        scale: float = 1.0,
        taps: tuple[int, ...] = (),
        model: Any = base_model,
    ) -> StatesServer:
        made = StatesServer("", dies_after=dies_after, root=root, scale=scale, taps=taps)
        made.cut = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
        server = _Server(("127.0.0.1", 0), _handler(model, made))
        made.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return made

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def _handler(model: Any, node: StatesServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/states/"):
                data, shape = node.waiting.pop(self.path.removeprefix("/states/"))
                self.send_response(200)
                self.send_header("X-States-Dtype", "bfloat16")
                self.send_header("X-States-Shape", shape)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
                return
            card = {"id": "base", "root": node.root, "max_model_len": 128}
            card |= {"carry_on_taps": list(node.taps)} if node.tells_taps and node.taps else {}
            card |= {} if node.quantization is None else {"carry_on_quantization": node.quantization}
            self._send({"data": [card]} if self.path == "/v1/models" else {"version": "test"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/tokenize":
                self._send({"tokens": node.cut(body["prompt"])})
                return
            if node.dies_after is not None and len(node.asked) >= node.dies_after:
                self.close_connection = True  # a process that was killed: the connection ends without an answer
                return
            if self.path == "/v1/completions":
                node.asked.append(1)
                self._send(node.keep(model, body))
                return
            node.asked.append(len(body["input"]))
            data, metadata = node.states(model, body)
            self.send_response(200)
            self.send_header("metadata", json.dumps(metadata))
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _send(self, answer: dict[str, Any]) -> None:
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    return Handler


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")
