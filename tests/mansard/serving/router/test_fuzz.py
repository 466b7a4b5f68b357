"""Hostile bytes at the router's public port and admin socket: a clear 4xx or a closed connection, nothing else.

A few hundred seeded cases in the tests; `make fuzz-router` runs this file as a program with many, and prints one line
of JSON. What is checked of each case: only known statuses, no word about our insides, nothing at the engine that the
router would not have written itself, the worker alive and answering afterwards.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import json
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

WAIT_SECONDS = 1.0
"""An unfinished request is never answered; so long its answer is waited for."""
KNOWN = {100, 200, 400, 401, 404, 405, 408, 413, 417, 429, 431, 503}
LEAKS = (b"Traceback", b"aiohttp", b"site-packages", b"/mansard/", b"Error:", b"127.0.0.1:")
TARGETS = (
    *(b"/v1/completions", b"/v1/chat/completions", b"/v1/models", b"/health", b"/pooling", b"/update_weights"),
    *(b"//v1/completions", b"/v1//completions", b"/v1/%63ompletions", b"/v1/completions%2e", b"/v1/./completions"),
    *(b"/v1/../v1/completions", b"/../pooling", b"/v1/completions/../../pooling", b"/v1/completions/..%2f..%2fpooling"),
    *(
        b"http://127.0.0.1/v1/completions",
        b"http://engine/pooling",
        b"*",
        b"/",
        b"",
        b"\\v1\\completions",
        b"/V1/Completions",
    ),
    *(
        b"/v1/completions;x",
        b"/v1/completions#x",
        b"/v1/completions?x=/pooling",
        b"/v1/completions\0",
        b"/v1/completions\t",
    ),
    *(
        b"/v1/completions HTTP/1.1\r\nx: y",
        b"/metrics",
        b"/observations",
        b"/records?after=9",
        b"/sleep",
        b"/v1/load_lora_adapter",
    ),
    *("/v1/cömpletions".encode(), b"/" + b"a" * 9000, b"/v1/completions?" + b"a" * 9000, b"/_control"),
)
METHODS = (
    b"POST",
    b"GET",
    b"post",
    b"PUT",
    b"CONNECT",
    b"TRACE",
    b"OPTIONS",
    b"PRI",
    b"P OST",
    b"",
    b"A" * 3000,
    b"\0",
)
VERSIONS = (b"HTTP/1.1", b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/1.1 x", b"", b"http/1.1", b"HTTP/1.10")
SECOND = b"POST /pooling HTTP/1.1\r\nhost: engine\r\ncontent-length: 2\r\n\r\n{}"
BODIES = (
    *(b'{"model": "tiny", "prompt": "x"}', b'{"model": "tiny", "prompt": "x", "stream": true}', b"", b"{", b"[" * 5000),
    *(
        b"\xff\xfe",
        b'{"model": null}',
        b'{"model": "other"}',
        b"9" * 5000,
        b"{}" + SECOND,
        b"0\r\n\r\n" + SECOND,
        SECOND,
    ),
)
LINES = (
    *(b"transfer-encoding: chunked", b"transfer-encoding: xchunked", b"transfer-encoding : chunked", b"te: chunked"),
    *(b"transfer-encoding: chunked, identity", b"transfer-encoding:\tchunked", b"transfer-encoding: identity"),
    *(b"content-length: 0", b"content-length: 5", b"content-length: -1", b"content-length: +3", b"content-length: 0x5"),
    *(b"content-length: 99999999999999999999", b"content-length: 3, 3", b"content-length: 8388609", b"content-length:"),
    *(b"expect: 100-continue", b"expect: nothing", b"connection: upgrade", b"upgrade: h2c", b"upgrade: websocket"),
    *(b"connection: content-length", b"connection: close, x-user-id", b"content-encoding: gzip", b"host: other"),
    *(
        b"x: a\r\n b",
        b"x: \0",
        b"x: a\rb",
        b"x\0: a",
        b": a",
        b"x",
        b"x : a",
        b"\x80: a",
        b"x: \x80\xff",
        b"x: " + b"a" * 9000,
    ),
    *(b"x-mansard-version: 1", b"x-mansard-version: x", b"x-mansard-version: 99999999999", b"x-mansard-session: \xff"),
    *(b"authorization: Bearer", b"authorization: Bearer " + b"k" * 5000, b"cookie: a=b", b"x-user-id: \xc3\x28"),
)


def hostile(chance: random.Random) -> bytes:
    """One connection's bytes: mostly a request with one or a few things wrong, sometimes two requests or noise."""
    if chance.random() < 0.05:
        return chance.randbytes(chance.randrange(1, 400))
    is_sane = chance.random() < 0.5
    method = b"POST" if is_sane else chance.choice(METHODS)
    target = b"/v1/completions" if is_sane else chance.choice(TARGETS)
    version = b"HTTP/1.1" if is_sane or chance.random() < 0.7 else chance.choice(VERSIONS)
    body = chance.choice(BODIES)
    lines = [b"host: x", *chance.choices(LINES, k=chance.choice((0, 1, 1, 2, 3)))]
    if chance.random() < 0.03:
        lines += [b"x-%d: y" % i for i in range(400)]
    if chance.random() < 0.7:
        lines.append(b"content-length: %d" % (len(body) + chance.choice((0, 0, 0, 0, -1, 1, 100))))
    else:
        lines.append(b"transfer-encoding: chunked")
        size = chance.choice(
            (b"%x" % len(body), b"-1", b"0x2", b"f" * 17, b"%x;a=b" % len(body), b" 2", b"2 ", b"", b"g")
        )
        body = (
            size
            + b"\r\n"
            + body
            + chance.choice((b"\r\n0\r\n\r\n", b"\r\n0\r\nx: y\r\n\r\n", b"0\r\n\r\n", b"", b"\n0\n\n"))
        )
    chance.shuffle(lines)
    end = b"\r\n" if chance.random() < 0.9 else chance.choice((b"\n", b"\r", b"\r\r\n", b"\0\r\n"))
    data = b" ".join((method, target, version)) + end + end.join(lines) + end + end + body
    if chance.random() < 0.1:
        data += SECOND
    if chance.random() < 0.1:
        data = data[: chance.randrange(len(data))]
    return data


async def answer_to(data: bytes, connect: Callable[[], Any]) -> bytes:
    """What comes back until the other side closes, or nothing more comes; then this side goes away."""
    received = b""
    reader, writer = await connect()
    try:
        cut = len(data) // 2
        writer.write(data[:cut])
        await asyncio.sleep(0)
        writer.write(data[cut:])
        while True:
            async with asyncio.timeout(WAIT_SECONDS):
                more = await reader.read(65536)
            received += more
            if not more:
                break
    except (TimeoutError, OSError):
        pass
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return received


def check_answer(data: bytes, answer: bytes) -> list[int]:
    """The statuses in it."""
    statuses = [int(code) for code in re.findall(rb"HTTP/1\.[01] (\d{3})", answer)]
    assert set(statuses) <= KNOWN, (data, answer[:500])
    assert not answer or answer.startswith((b"HTTP/1.1 ", b"HTTP/1.0 ")), (data, answer[:500])
    assert not any(word in answer for word in LEAKS), (data, answer[:2000])
    return statuses


def run(rig: Any, seed: int, num_cases: int, at_once: int, is_admin: bool = False) -> Counter[str]:
    """How often which status came; AssertionError with the bytes of a case that broke something."""
    chance, seen, pid = random.Random(seed), Counter[str](), rig.seen()["pid"]

    async def connect() -> Any:
        if is_admin:
            return await asyncio.open_unix_connection(str(rig.home / "run/router-0.sock"))
        return await asyncio.open_connection("127.0.0.1", rig.port)

    async def batch(cases: list[bytes]) -> list[bytes]:
        return await asyncio.gather(*(answer_to(case, connect) for case in cases))

    for _ in range(0, num_cases, at_once):
        cases = [hostile(chance) for _ in range(at_once)]
        for case, answer in zip(cases, asyncio.run(batch(cases)), strict=True):
            statuses = check_answer(case, answer)
            seen.update(map(str, statuses) if statuses else ["closed"])
        assert rig.one.seen()["smuggled"] == 0, (cases, rig.one.seen()["paths"])
        assert (rig.call().status, rig.seen()["pid"]) == (200, pid)
    rig.wait_until(lambda: rig.seen()["in_flight"] == 0, "all requests to end")
    return seen


@pytest.mark.parametrize("is_admin", [False, True])
def test_hostile_bytes_get_a_clear_answer_and_break_nothing(rig: Any, is_admin: bool) -> None:
    rig.write(None)
    seen = run(rig, seed=7, num_cases=160, at_once=40, is_admin=is_admin)
    assert seen["400"] > 20
    assert is_admin or seen["200"] > 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    options = parser.parse_args()
    print(f"seed {options.seed}")
    spec = importlib.util.spec_from_file_location("router_conftest", Path(__file__).with_name("conftest.py"))
    assert spec is not None
    assert spec.loader is not None
    conftest = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = conftest
    spec.loader.exec_module(conftest)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, conftest.rig_in(Path(folder)) as rig:
        rig.write(None)
        public = run(rig, options.seed, options.cases, at_once=250)
        admin = run(rig, options.seed + 1, options.cases // 4, at_once=250, is_admin=True)
    found = {"seed": options.seed, "cases": options.cases + options.cases // 4, "failures": 0}
    print(json.dumps({**found, "public": dict(sorted(public.items())), "admin": dict(sorted(admin.items()))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
