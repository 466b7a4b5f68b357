"""64 users who ask the router all the time, half of them streaming, and what became of each request.

A user opens a connection for each request, so that requests also wait in the router's listening socket. Each failure
keeps its own moments and words; who is to blame for it is decided afterwards (bench_loss.py).
"""

import asyncio
import json
import threading
import time
from dataclasses import dataclass, field

NUM_USERS = 64
NUM_KEYS = 1200
"""So that 5 % of them are 60: a step is judged on 30 users a side at least."""
ANSWER_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Failed:
    """`began` and `ended` by the monotonic clock. `version` and `status` are None where no head came."""

    began: float
    ended: float
    version: int | None
    status: int | None
    is_stream: bool
    has_error_event: bool
    words: str


@dataclass
class Load:
    """Start, let it run, stop. `num_done` and `num_streams` count whole answers too."""

    port: int
    num_done: int = 0
    num_streams: int = 0
    by_version: dict[int, int] = field(default_factory=dict)
    failed: list[Failed] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all()), name="load")
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        assert self._thread is not None
        self._thread.join()

    async def _all(self) -> None:
        await asyncio.gather(*(self._user(number) for number in range(NUM_USERS)))

    async def _user(self, number: int) -> None:
        turn = number
        while not self._stop.is_set():
            turn += NUM_USERS
            await self._ask(f"user-{turn % NUM_KEYS}", is_stream=(turn // NUM_USERS) % 2 == 0)

    async def _ask(self, key: str, is_stream: bool) -> None:
        began, answer, words = time.monotonic(), b"", ""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                answer = await self._exchange(key, is_stream)
        except TimeoutError:
            words = "no answer in time"
        except _Broken as broken:
            answer, words = broken.received, broken.words
        head, _, body = answer.partition(b"\r\n\r\n")
        version = _version(head)
        self.num_done += 1
        self.num_streams += is_stream
        if not words and _is_whole(head, body, is_stream) and version is not None:
            self.by_version[version] = self.by_version.get(version, 0) + 1
            return
        has_event = b'"engine_failed"' in body
        words = words or f"{head[:60]!r} ... {body[-200:]!r}"
        self.failed.append(Failed(began, time.monotonic(), version, _status(head), is_stream, has_event, words))

    async def _exchange(self, key: str, is_stream: bool) -> bytes:
        """All bytes of the answer. Raises _Broken with those that came."""
        body = json.dumps({"model": "demo", "prompt": "x = ", "max_tokens": 8, "stream": is_stream}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-mansard-session: {key}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        received = b""
        writer = None
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(head.encode() + body)
            while data := await reader.read(65536):
                received += data
        except OSError as error:
            raise _Broken(received, f"{type(error).__name__}: {error}") from error
        finally:
            if writer is not None:
                writer.close()
        return received


class _Broken(Exception):
    def __init__(self, received: bytes, words: str) -> None:
        super().__init__(words)
        self.received = received
        self.words = words


def _version(head: bytes) -> int | None:
    _, found, rest = head.lower().partition(b"x-mansard-version: ")
    return int(rest.partition(b"\r\n")[0]) if found else None


def _status(head: bytes) -> int | None:
    words = head.split(b" ", 2)
    return int(words[1]) if len(words) == 3 else None


def _is_whole(head: bytes, body: bytes, is_stream: bool) -> bool:
    """200, to its end, and its own end: a stream's [DONE] and last chunk, a whole answer's length."""
    if not head.startswith(b"HTTP/1.1 200 "):
        return False
    if is_stream:
        return body.endswith(b"0\r\n\r\n") and b"data: [DONE]" in body and b'"error"' not in body
    _, _, rest = head.lower().partition(b"content-length: ")
    return int(rest.partition(b"\r\n")[0] or -1) == len(body)
