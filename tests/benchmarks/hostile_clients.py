"""The clients of bench_hostile.py, each a process of its own: `python hostile_clients.py ATTACK --port N`.

An attack runs for `--seconds` from 127.0.0.1 and prints nothing. `normal` asks 20 times a second from `--address`, a
new connection each, and prints one JSON line: how many failed (no 200 within two seconds), their median, and whether
any failed among those that began in the last `--quiet-seconds`.
"""

import argparse
import asyncio
import contextlib
import json
import socket
import statistics
import time
from collections.abc import Awaitable, Callable

MEGABYTE = 1024 * 1024
TIMEOUT_SECONDS = 2.0
PACE_SECONDS = 0.05
SMALL = b'{"model": "tiny", "prompt": "x"}'


def head(key: str, framing: bytes) -> bytes:
    credentials = b"authorization: Bearer " + key.encode() + b"\r\n" if key else b""
    return b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n" + credentials + framing + b"\r\n\r\n"


def whole(key: str, body: bytes) -> bytes:
    return head(key, b"content-length: %d" % len(body)) + body


def prompt(name: str, is_streamed: bool = True) -> bytes:
    return json.dumps({"model": "tiny", "prompt": f"/{name}", "stream": is_streamed}).encode()


class Attack:
    """Where to, with which key, until when."""

    def __init__(self, port: int, key: str, seconds: float) -> None:
        self.port = port
        self.key = key
        self.end = time.monotonic() + seconds

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port, limit=4096)

    async def again(self, once: Callable[[], Awaitable[None]], pause_seconds: float = 0.05) -> None:
        """Until the end; what the other side breaks off is begun anew."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.end - time.monotonic()):
                while True:
                    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                        await once()
                    await asyncio.sleep(pause_seconds)

    async def many(self, number: int, once: Callable[[], Awaitable[None]], pause_seconds: float = 0.05) -> None:
        await asyncio.gather(*(self.again(once, pause_seconds) for _ in range(number)))

    async def chunks(self) -> None:
        """Row 1: a body in chunks of one byte."""
        block = b"1\r\nx\r\n" * 10_000

        async def once() -> None:
            _, writer = await self.connect()
            with contextlib.closing(writer):
                writer.write(head(self.key, b"transfer-encoding: chunked"))
                while True:
                    writer.write(block)
                    await writer.drain()

        await self.many(16, once)

    async def chunks_64(self) -> None:
        """Row 1 without a key, over 64 connections."""
        block = b"1\r\nx\r\n" * 10_000

        async def once() -> None:
            _, writer = await self.connect()
            with contextlib.closing(writer):
                writer.write(head("wrong", b"transfer-encoding: chunked"))
                while True:
                    writer.write(block)
                    await writer.drain()

        await self.many(64, once)

    async def _held_back(self, size: int) -> None:
        reader, writer = await self.connect()
        with contextlib.closing(writer):
            writer.write(head(self.key, b"content-length: %d" % size))
            for at in range(0, size - 1, MEGABYTE):
                writer.write(b"x" * min(MEGABYTE, size - 1 - at))
                await writer.drain()
            await reader.read()

    async def bodies(self) -> None:
        """Row 2: 96 bodies of 8 MiB whose last byte does not come."""
        await self.many(96, lambda: self._held_back(8 * MEGABYTE), 1.0)

    async def small_bodies(self) -> None:
        """Row 2's kin: 4,000 bodies of 64 KB whose last byte does not come."""
        await self.many(4_000, lambda: self._held_back(65_536), 5.0)

    async def _unread(self, request: bytes) -> None:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", self.port))
        _, writer = await asyncio.open_connection(sock=client)
        assert isinstance(writer.transport, asyncio.Transport)
        writer.transport.pause_reading()
        with contextlib.closing(writer):
            writer.write(request)
            while not writer.transport.is_closing():
                await asyncio.sleep(1.0)

    async def answers(self) -> None:
        """Row 3: whole answers of 16 MB that 100 clients ask for and do not read."""
        await self.many(100, lambda: self._unread(whole(self.key, prompt("large", is_streamed=False))), 5.0)

    async def streams(self) -> None:
        """Row 4: 1,500 streams that nobody reads."""
        await self.many(1_500, lambda: self._unread(whole(self.key, prompt("endless"))), 5.0)

    async def _read(self, name: str) -> None:
        reader, writer = await self.connect()
        with contextlib.closing(writer):
            writer.write(whole(self.key, prompt(name)))
            while await reader.read(4096):
                pass

    async def places(self) -> None:
        """Row 5: 1,300 long streams, read as they come."""
        await self.many(1_300, lambda: self._read("slow"), 5.0)

    async def idle(self) -> None:
        """Row 6: 17,500 connections that say nothing."""
        with contextlib.ExitStack() as writers:
            for _ in range(175):
                if time.monotonic() > self.end:
                    return
                for made in await asyncio.gather(*(self.connect() for _ in range(100)), return_exceptions=True):
                    if not isinstance(made, BaseException):
                        writers.enter_context(contextlib.closing(made[1]))
            await asyncio.sleep(max(0.0, self.end - time.monotonic()))

    async def json_bodies(self) -> None:
        """Row 7: 8 clients that post JSON of 8 MB."""
        filler = b"[" + b"[1,2]," * 1_300_000 + b"0]"
        tools = b"[" + b"1," * 40_000 + b"1]"
        request = whole(self.key, b'{"messages": ' + filler + b', "model": "tiny", "tools": ' + tools + b"}")

        async def once() -> None:
            reader, writer = await self.connect()
            with contextlib.closing(writer):
                while True:
                    writer.write(request)
                    await writer.drain()
                    answer = await reader.readuntil(b"\r\n\r\n")
                    length = int(answer.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                    await reader.readexactly(length)

        await self.many(8, once)

    async def stalls(self) -> None:
        """Row 8: 1,300 requests whose engine stalls in four ways."""
        names = ("silent", "head-only", "two-tokens", "drip")
        await asyncio.gather(*(self.many(325, lambda name=name: self._read(name), 5.0) for name in names))  # type: ignore[misc]

    async def leavers(self) -> None:
        """Row 9: clients that leave in the middle of an answer."""

        async def once() -> None:
            reader, writer = await self.connect()
            with contextlib.closing(writer):
                writer.write(whole(self.key, prompt("endless")))
                await reader.read(1)
                writer.transport.abort()

        await self.many(32, once, 0.01)

    async def gigabyte(self) -> None:
        """Row 10: chunked bodies of 1 GB."""
        block = b"100000\r\n" + b"x" * MEGABYTE + b"\r\n"

        async def once() -> None:
            _, writer = await self.connect()
            with contextlib.closing(writer):
                writer.write(head(self.key, b"transfer-encoding: chunked"))
                for _ in range(1024):
                    writer.write(block)
                    await writer.drain()
                writer.write(b"0\r\n\r\n")

        await self.many(4, once)


async def _one_normal(port: int, key: str, address: str) -> float:
    """Seconds to the whole answer. Raises when there is no 200."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))
    with contextlib.closing(writer):
        begun = time.monotonic()
        writer.write(whole(key, SMALL))
        answer = await reader.readuntil(b"\r\n\r\n")
        if not answer.startswith(b"HTTP/1.1 200"):
            raise ConnectionError(answer.decode("latin-1"))
        await reader.readexactly(int(answer.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]))
        return time.monotonic() - begun


async def normal(port: int, key: str, address: str, seconds: float, quiet_seconds: float) -> dict[str, object]:
    begun, results = time.monotonic(), list[tuple[float, float | None, str]]()

    async def one(at: float) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                results.append((at, await _one_normal(port, key, address), ""))
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            results.append((at, None, f"{type(error).__name__} {error}"[:80]))

    async with asyncio.TaskGroup() as group:
        for number in range(int(seconds / PACE_SECONDS)):
            await asyncio.sleep(max(0.0, begun + number * PACE_SECONDS - time.monotonic()))
            group.create_task(one(time.monotonic() - begun))
    attacked = [result for result in results if result[0] < seconds - quiet_seconds - 10.0]
    after = [result for result in results if result[0] >= seconds - quiet_seconds]
    problems = [problem for _, _, problem in results if problem]
    return {
        "failed_fraction": sum(took is None for _, took, _ in attacked) / len(attacked),
        "p50_ms": statistics.median(TIMEOUT_SECONDS if took is None else took for _, took, _ in attacked) * 1000,
        "is_recovered": all(took is not None for _, took, _ in after),
        "problem": max(set(problems), key=problems.count) if problems else "",
    }


ATTACKS = [name for name in vars(Attack) if not name.startswith("_") and name not in ("connect", "again", "many")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attack", choices=[*ATTACKS, "normal"])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--key", default="")
    parser.add_argument("--address", default="127.0.0.2")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--quiet-seconds", type=float, default=2.0)
    options = parser.parse_args()
    if options.attack == "normal":
        asking = normal(options.port, options.key, options.address, options.seconds, options.quiet_seconds)
        print(json.dumps(asyncio.run(asking)))
    else:
        asyncio.run(getattr(Attack(options.port, options.key, options.seconds), options.attack)())


if __name__ == "__main__":
    main()
