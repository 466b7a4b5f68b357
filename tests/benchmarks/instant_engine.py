"""A stand-in for an engine (an outside program): answers the OpenAI API at once, streaming too, and fails on request.

Run as a process: `python instant_engine.py --name v1`; the first line of its output is JSON with the port. It says its
own name as the first token, so a client knows who answered. GET /_seen tells what it saw; POST /_control changes how it
behaves. `fail` is one of: none, error500, error400, refuse (closes the connection unanswered), hang (never answers),
die-before-event (closes after the head), error-first (a stream whose only event is an error), die-mid-stream (closes
after two tokens), hang-after-two (stops after two tokens until the mode changes). A prompt in PROMPTS has an effect of
its own on that request alone, whatever the mode. Not an HTTP server for anything else.
"""

import argparse
import asyncio
import json
import os
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

PROMPTS = {
    b'"/endless"': "a stream without an end: 600 KB at once, then 300 tokens a second",
    b'"/drip"': "a stream of one byte a tenth of a second that never completes an event",
    b'"/head-only"': "a stream's head, then nothing",
    b'"/two-tokens"': "a stream of two tokens, then nothing",
    b'"/silent"': "nothing at all",
    b'"/slow"': "a stream of ten tokens a second without an end",
    b'"/large"': "a whole answer of 16 MB",
}
LARGE = b'{"choices": [{"text": "' + b"x" * 16_000_000 + b'"}]}'
BURST_EVENTS, BLOCK_EVENTS = 6_000, 60
JSON_HEAD = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
ROUTED = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings")
SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: instant\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


@dataclass
class Behaviour:
    """What /_control changes. `delay_ms` comes before the first byte, `first_ms` between a stream's head and its first
    token, `interval_ms` between tokens."""

    fail: str = "none"
    delay_ms: float = 0.0
    first_ms: float = 0.0
    interval_ms: float = 0.0
    tokens: int = 16


@dataclass
class Seen:
    """What /_seen tells. `cancelled` are requests whose client went away before the end.

    `smuggled` are requests with another path or method than a router lets through, or without its own head.
    """

    requests: int = 0
    in_flight: int = 0
    cancelled: int = 0
    finished: int = 0
    paths: list[str] = field(default_factory=list)
    smuggled: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: str = ""


class Engine:
    """Its behaviour, and what it saw."""

    def __init__(self, name: str, behaviour: Behaviour) -> None:
        self.name = name
        self.behaviour = behaviour
        self.seen = Seen()

    def whole(self, path: str) -> dict[str, Any]:
        """An answer that is not streamed."""
        is_chat = "/chat/" in path
        said = {"message": {"role": "assistant", "content": self.name}} if is_chat else {"text": self.name}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        return {
            "id": "instant-1",
            "created": 1,
            "model": self.name,
            "object": "chat.completion" if is_chat else "text_completion",
            "choices": [{"index": 0, **said, "finish_reason": "length"}],
            "usage": usage,
        }

    def event(self, index: int) -> bytes:
        text = self.name if index == 0 else f" {index}"
        data = json.dumps({"object": "text_completion", "choices": [{"index": 0, "text": text}]})
        return _chunk(f"data: {data}\n\n".encode())


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Connection(asyncio.Protocol):
    """One client connection, one request after the other."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.buffer = bytearray()
        self.head: tuple[bytes, int] | None = None
        self.is_paused = False
        self.transport: asyncio.Transport
        self.timer: asyncio.TimerHandle | None = None
        self.is_answering = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self.timer is not None:
            self.timer.cancel()
        if self.is_answering:
            self.is_answering = False
            self.engine.seen.in_flight -= 1
            self.engine.seen.cancelled += 1

    def pause_writing(self) -> None:
        self.is_paused = True

    def resume_writing(self) -> None:
        self.is_paused = False

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if self.head is None:
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self.buffer[:end])
            _, has_length, after = head.lower().partition(b"content-length:")
            self.head = head, int(after.split(b"\r\n")[0]) if has_length else 0
            del self.buffer[: end + 4]
        head, size = self.head
        if len(self.buffer) < size:
            return
        body = bytes(self.buffer[:size])
        del self.buffer[:size]
        self.head = None
        request_line, *lines = head.decode("latin-1").split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        method, path, _ = request_line.split(" ")
        self.answer(method, path, headers, body)

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        engine, seen = self.engine, self.engine.seen
        if path == "/_control":
            engine.behaviour = Behaviour(**{**asdict(engine.behaviour), **json.loads(body)})
            return self.send_json(200, asdict(engine.behaviour))
        if path == "/_seen":
            return self.send_json(200, asdict(seen))
        seen.requests += 1
        seen.paths.append(f"{method} {path}")
        del seen.paths[:-50]
        seen.smuggled += method != "POST" or path not in ROUTED or headers.get("host") != "engine"
        seen.headers = headers
        seen.body = body.decode("utf-8", "replace")[:10_000]
        if engine.behaviour.fail == "refuse":
            return self.transport.close()
        seen.in_flight += 1
        self.is_answering = True
        prompt = next((prompt for prompt in PROMPTS if prompt in body[:200]), b"")
        if engine.behaviour.fail == "hang" or prompt == b'"/silent"':
            return None
        if prompt:
            return self.play(prompt)
        if engine.behaviour.delay_ms:
            loop = asyncio.get_running_loop()
            self.timer = loop.call_later(engine.behaviour.delay_ms / 1000, self.begin, path, body)
            return None
        return self.begin(path, body)

    def play(self, prompt: bytes) -> None:
        """What a prompt of PROMPTS asks for."""
        if prompt == b'"/large"':
            self.transport.write(JSON_HEAD % (200, b"OK", len(LARGE)) + LARGE)
            return self.finished()
        self.transport.write(SSE_HEAD)
        if prompt == b'"/two-tokens"':
            self.transport.write(self.engine.event(0) + self.engine.event(1))
        elif prompt == b'"/endless"':
            self.transport.write(self.engine.event(1) * BURST_EVENTS)
            self.repeat(self.engine.event(1) * BLOCK_EVENTS, 0.2)
        elif prompt == b'"/slow"':
            self.repeat(self.engine.event(1), 0.1)
        elif prompt == b'"/drip"':
            self.repeat(_chunk(b"d"), 0.1)
        return None

    def repeat(self, data: bytes, pause_seconds: float) -> None:
        if not self.is_paused:
            self.transport.write(data)
        self.timer = asyncio.get_running_loop().call_later(pause_seconds, self.repeat, data, pause_seconds)

    def begin(self, path: str, body: bytes) -> None:
        fail = self.engine.behaviour.fail
        if fail.startswith("error"):
            return self.finish_json(int(fail.removeprefix("error")), {"error": {"message": f"{self.engine.name}: no"}})
        if b'"stream":true' in body.replace(b" ", b""):
            if fail == "die-before-event":
                self.transport.write(SSE_HEAD)
                return self.transport.close()
            if fail == "error-first":
                event = b'data: {"error": {"message": "engine core died", "code": 500}}\n\n'
                self.transport.write(SSE_HEAD + _chunk(event) + b"0\r\n\r\n")
                return self.finished()
            if self.engine.behaviour.first_ms:
                self.transport.write(SSE_HEAD)
                loop = asyncio.get_running_loop()
                self.timer = loop.call_later(self.engine.behaviour.first_ms / 1000, self.write_token, 0)
                return None
            self.transport.write(SSE_HEAD + self.engine.event(0))
            return self.next_token(1)
        return self.finish_json(200, self.engine.whole(path))

    def next_token(self, index: int) -> None:
        behaviour, loop = self.engine.behaviour, asyncio.get_running_loop()
        if behaviour.fail in ("die-mid-stream", "hang-after-two") and index < 2:
            return self.write_token(index)
        if behaviour.fail == "die-mid-stream":
            return self.transport.close()
        if behaviour.fail == "hang-after-two":
            self.timer = loop.call_later(0.01, self.next_token, index)
            return None
        if behaviour.interval_ms and index < behaviour.tokens:
            self.timer = loop.call_later(behaviour.interval_ms / 1000, self.write_token, index)
            return None
        self.transport.write(b"".join(self.engine.event(i) for i in range(index, behaviour.tokens)))
        self.transport.write(_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        return self.finished()

    def write_token(self, index: int) -> None:
        self.transport.write(self.engine.event(index))
        self.next_token(index + 1)

    def finish_json(self, status: int, tree: dict[str, Any]) -> None:
        self.send_json(status, tree)
        self.finished()

    def finished(self) -> None:
        self.is_answering = False
        self.engine.seen.in_flight -= 1
        self.engine.seen.finished += 1

    def send_json(self, status: int, tree: dict[str, Any]) -> None:
        data = json.dumps(tree).encode()
        self.transport.write(JSON_HEAD % (status, b"OK" if status < 400 else b"Error", len(data)) + data)


async def serve(engine: Engine, port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(engine), "127.0.0.1", port, backlog=1024)
    print(json.dumps({"port": server.sockets[0].getsockname()[1], "pid": os.getpid()}), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)  # ends with its owner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="instant")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--fail", default="none")
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("--interval-ms", type=float, default=0.0)
    parser.add_argument("--tokens", type=int, default=16)
    options = parser.parse_args()
    behaviour = Behaviour(options.fail, options.delay_ms, 0.0, options.interval_ms, options.tokens)
    asyncio.run(serve(Engine(options.name, behaviour), options.port))


if __name__ == "__main__":
    main()
