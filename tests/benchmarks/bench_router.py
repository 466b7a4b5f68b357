"""What the router adds to the time to first token, and how many requests a second it passes beside other programs.

64 streams at once, 20 tokens a second each, a new one as each ends, in front of an instant engine: rounds straight to
the engine and through the router take turns, so that both see the same machine. A canary at 25 % is on, sessions are
many. Then small chat requests, not streamed, 16 at once, in turn through the router, LiteLLM's proxy (an environment of
its own, .venv-litellm) and HAProxy (the system's): each is one worker that has core 0 for itself, load and engine share
core 1. The last line is JSON: added_ttft_p50_ms, added_ttft_p99_ms (a quantile through the router minus the one
straight), added_200kb_p50_ms (streams of 200 KB prompts), requests_per_second, ratio_to_litellm, ratio_to_haproxy,
ratio_to_direct; a ratio is null where the program is missing. Where the router outruns the load on core 1, its rate and
HAProxy's are lower bounds. Where others use the machine, `chrt -f 10` in front shows what it would be.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import rivals

from mansard.serving.split import Split, with_canary, with_stable, write_split

ROOT = Path(__file__).resolve().parents[2]
ENGINE = str(Path(__file__).with_name("instant_engine.py"))
NUM_STREAMS = 64
TOKENS, INTERVAL_MS = 40, 50
STREAM_SECONDS = TOKENS * INTERVAL_MS / 1000
PROMPT_BYTES = 200 * 1024
SITE = """
format: 1
home: home
data: data
models: [tiny]
environments: {main: {python: /usr/bin/env, lock: none}, serve: {python: /usr/bin/env, lock: none}}
stages: {default: main}
ports: {router: 0}
"""


class Client(asyncio.Protocol):
    """One kept connection that sends a request and waits for the whole answer."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self._answer: asyncio.Future[float]
        self._started = 0.0
        self._first_token_seconds = 0.0
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    async def ask(self, request: bytes) -> float:
        """Seconds to the first token (of a stream) or to the end (of any other answer)."""
        self._answer = asyncio.get_running_loop().create_future()
        self._first_token_seconds, self._received = 0.0, b""
        self._started = time.perf_counter()
        self.transport.write(request)
        return await self._answer

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not self._first_token_seconds and b"data: " in self._received:
            self._first_token_seconds = time.perf_counter() - self._started
        if self._is_whole():
            assert self._received.startswith(b"HTTP/1.1 200"), self._received[:300]
            self._answer.set_result(self._first_token_seconds or time.perf_counter() - self._started)

    def _is_whole(self) -> bool:
        if self._received.endswith(b"\r\n0\r\n\r\n"):
            return True
        head, found, body = self._received.partition(b"\r\n\r\n")
        _, has_length, after = head.lower().partition(b"content-length: ")
        return bool(found and has_length) and len(body) == int(after.split(b"\r\n")[0])

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._answer.done():
            self._answer.set_exception(ConnectionError(f"broken off: {self._received[-300:]!r}"))


def request_bytes(session: str, prompt: str, is_streamed: bool) -> bytes:
    """A streamed completion, or a whole chat answer."""
    asked = {"prompt": prompt} if is_streamed else {"messages": [{"role": "user", "content": prompt}]}
    body = json.dumps({"model": "tiny", "stream": is_streamed, **asked}).encode()
    path = "/v1/completions" if is_streamed else "/v1/chat/completions"
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nx-mansard-session: {session}\r\n"
    return f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


async def _streams(port: int, seconds: float, prompt: str) -> list[float]:
    loop = asyncio.get_running_loop()
    first_tokens: list[float] = []
    end = time.perf_counter() + seconds

    async def one(number: int) -> None:
        await asyncio.sleep(random.uniform(0, STREAM_SECONDS))
        _, client = await loop.create_connection(Client, "127.0.0.1", port)
        request = request_bytes(f"user-{number}", prompt, is_streamed=True)
        while time.perf_counter() < end:
            first_tokens.append(await client.ask(request))
        client.transport.close()

    await asyncio.gather(*(one(n) for n in range(NUM_STREAMS)))
    return first_tokens


async def _requests_per_second(port: int, seconds: float) -> float:
    loop = asyncio.get_running_loop()
    start = time.perf_counter()
    counts = [0] * 16

    async def one(number: int) -> None:
        _, client = await loop.create_connection(Client, "127.0.0.1", port)
        request = request_bytes(f"user-{number}", "x", is_streamed=False)
        while time.perf_counter() - start < seconds:
            await client.ask(request)
            counts[number] += 1
        client.transport.close()

    await asyncio.gather(*(one(n) for n in range(len(counts))))
    return sum(counts) / (time.perf_counter() - start)


def quantile_ms(seconds: list[float], share: float) -> float:
    return sorted(seconds)[min(len(seconds) - 1, int(len(seconds) * share))] * 1000


def added(ports: dict[str, int], rounds: int, round_seconds: float, prompt: str) -> dict[str, float]:
    """Quantiles of the time to first token through the router minus those straight to the engine."""
    seen: dict[str, list[float]] = {name: [] for name in ports}
    for _ in range(rounds):
        for name, port in ports.items():
            seen[name] += asyncio.run(_streams(port, round_seconds, prompt))
    for name, seconds in seen.items():
        p50, p90, p99 = (quantile_ms(seconds, share) for share in (0.5, 0.9, 0.99))
        print(
            f"{name:8} {len(prompt):7} bytes {len(seconds):5} streams  p50 {p50:.3f}  p90 {p90:.3f}  p99 {p99:.3f} ms"
        )
    return {
        f"p{share:.0f}": quantile_ms(seen["router"], share / 100) - quantile_ms(seen["direct"], share / 100)
        for share in (50, 99)
    }


@contextlib.contextmanager
def _process(*command: str, core: int | None = None) -> Iterator[int]:
    """A child that says its port in a line of JSON when it is ready."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = rivals.on_core(core, [sys.executable, *command])
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as child:
        try:
            assert child.stdout is not None
            yield json.loads(child.stdout.readline())["port"]
        finally:
            child.kill()


@contextlib.contextmanager
def _router(folder: Path, engine_port: int, core: int | None) -> Iterator[int]:
    """One worker with a canary at 25 %, both versions on the one engine."""
    endpoint = f"http://127.0.0.1:{engine_port}"
    split = with_stable(Split(), "tiny", 1, endpoint, "tiny", 1)
    write_split(folder / "home/split.json", with_canary(split, "tiny", 2, endpoint, "tiny", 25, 2))
    site = folder / "site.yaml"
    site.write_text(SITE)
    worker = ("-m", "mansard.serving.router.worker", "--lease-seconds", "86400", "--site", str(site))
    with _process(*worker, core=core) as port:
        yield port


def _added(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    paced = ("--interval-ms", str(INTERVAL_MS), "--tokens", str(TOKENS))
    with _process(ENGINE, *paced) as engine_port, _router(folder, engine_port, None) as router_port:
        ports = {"direct": engine_port, "router": router_port}
        small = added(ports, options.rounds, options.round_seconds, "x")
        large = added(ports, max(1, options.rounds // 3), options.round_seconds, "x" * PROMPT_BYTES)
    return {
        "added_ttft_p50_ms": round(small["p50"], 3),
        "added_ttft_p99_ms": round(small["p99"], 3),
        "added_200kb_p50_ms": round(large["p50"], 3),
    }


def _rates(options: argparse.Namespace, folder: Path) -> dict[str, float | None]:
    """The best of the rounds of each, taken in turn."""
    cores = sorted(os.sched_getaffinity(0))
    proxy_core, load_core = (cores[0], cores[1]) if len(cores) > 1 else (None, None)
    if load_core is not None:
        os.sched_setaffinity(0, {load_core})
    with (
        _process(ENGINE, core=load_core) as engine_port,
        _router(folder, engine_port, proxy_core) as router_port,
        rivals.litellm(engine_port, folder, proxy_core) as litellm_port,
        rivals.haproxy(engine_port, folder, proxy_core) as haproxy_port,
    ):
        ports = {"direct": engine_port, "router": router_port, "litellm": litellm_port, "haproxy": haproxy_port}
        seen: dict[str, float] = {}
        for _ in range(options.rate_rounds):
            for name, port in ports.items():
                if port is not None:
                    rate = asyncio.run(_requests_per_second(port, options.rate_seconds))
                    print(f"{name:8} {rate:8.0f} requests/s")
                    seen[name] = max(seen.get(name, 0.0), rate)
    ratios = {
        f"ratio_to_{name}": round(seen["router"] / seen[name], 3) if name in seen else None
        for name in ("litellm", "haproxy", "direct")
    }
    return {"requests_per_second": round(seen["router"]), **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="of each of direct and router")
    parser.add_argument("--round-seconds", type=float, default=6.0)
    parser.add_argument("--rate-rounds", type=int, default=3, help="of each program")
    parser.add_argument("--rate-seconds", type=float, default=3.0)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="bench-router-") as one,
        tempfile.TemporaryDirectory(prefix="bench-router-") as two,
    ):
        figures = {**_added(options, Path(one)), **_rates(options, Path(two))}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
