"""States that wait to be fetched, and the small HTTP server that hands each out once. Standard library only.

Whoever can reach the port can take what waits, if they know its key; keys are random, and told only to the client that
asked.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PATH = "/states/"
PORTS = 100
"""Engines of one machine each take one."""


@dataclass(frozen=True, slots=True)
class States:
    """Of one prompt: little-endian values of `dtype` (torch's word), [tokens, W]."""

    data: bytes | memoryview
    dtype: str
    shape: tuple[int, int]


class Held:
    """At most `limit_bytes`; where they do not suffice, what waits longest goes, and its client asks again."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._waiting: OrderedDict[str, States] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def put(self, key: str, states: States) -> None:
        """Keep it until it is taken, in place of what waits under the same key (a prompt that was computed again). A
        single one larger than the limit is kept alone."""
        with self._lock:
            if key in self._waiting:
                self._bytes -= len(self._waiting.pop(key).data)
            while self._waiting and self._bytes + len(states.data) > self.limit_bytes:
                self._bytes -= len(self._waiting.popitem(last=False)[1].data)
            self._waiting[key] = states
            self._bytes += len(states.data)

    def take(self, key: str) -> States | None:
        """None where the key is unknown, taken, or had to go."""
        with self._lock:
            found = self._waiting.pop(key, None)
            if found is not None:
                self._bytes -= len(found.data)
            return found


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512
    """A capture asks for many prompts at once; the standard library's 5 would refuse some."""


def serve(held: Held, host: str, first_port: int) -> int:
    """GET /states/KEY on the first free port from `first_port` up, by threads that end with the process. The port."""
    for port in range(first_port, first_port + PORTS):
        try:
            server = _Server((host, port), _handler(held))
        except OSError:
            continue
        threading.Thread(target=server.serve_forever, daemon=True, name="states of prompts").start()
        return port
    raise OSError(f"no port from {first_port} to {first_port + PORTS - 1} on {host} is free for states")


def _handler(held: Held) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            states = held.take(self.path.removeprefix(PATH)) if self.path.startswith(PATH) else None
            if states is None:
                self.send_error(404, "no states wait under this key")
                return
            self.send_response(200)
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Content-Length", str(len(states.data)))
            self.send_header("X-States-Dtype", states.dtype)
            self.send_header("X-States-Shape", ",".join(map(str, states.shape)))
            self.end_headers()
            self.wfile.write(states.data)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet: a capture asks thousands of times."""

    return Handler
