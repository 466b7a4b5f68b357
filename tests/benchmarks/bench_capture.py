"""Capture's throughput beside plain prefill of the same tokens: one model, vLLM in both modes, one after the other.

Prefill: completions of one token, no prefix cache, so many at once that batches are full. Capture: a pooling engine,
our fetching with its prefetch, states coded in fp8 and written in shards as the stage does it. Dummy weights, random
tokens, a 7B shape on a GPU; --tiny: a small shape on a CPU. --local: no engine at all but a process that answers at
once with states from its memory, so that what is measured is ours. The last line is JSON: tokens/s of each (`fetch`
without coding, `coding` without shards), capture_ratio_to_prefill, fetch_ratio_to_prefill, and
coding_in_threads_ratio: against coding on the thread that takes the answers, whose own milliseconds are told, too.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import numpy
import torch
from bench_serving_gpu import FULL, VOCABULARY, engine, write_model

from mansard.carry_on.fetching import Gives, fetch
from mansard.carry_on.filling import PREFETCH, REQUEST_SEQUENCES, REQUEST_TOKENS, CodingNode, fill
from mansard.carry_on.nodes import Node
from mansard.carry_on.pooling_engine import pooling_engine
from mansard.carry_on.sequences import TokenSequence, groups, key_of
from mansard.carry_on.shards import plan_shards
from mansard.carry_on.wire import encode

SMALL = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
LENGTH = 512


def sequences(count: int, seed: int) -> list[TokenSequence]:
    draw = random.Random(seed)
    rows = [[draw.randrange(3, VOCABULARY) for _ in range(LENGTH)] for _ in range(count)]
    tokens = [numpy.array(row, dtype=numpy.int32) for row in rows]
    return [TokenSequence(key_of(t), t) for t in tokens]


async def prefill(url: str, asked: list[TokenSequence], at_once: int) -> float:
    """Tokens/s."""
    left = iter(asked)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=900)) as session:

        async def user() -> None:
            for sequence in left:
                body = {"model": "bench", "prompt": sequence.tokens.tolist(), "max_tokens": 1}
                async with session.post(f"{url}/v1/completions", json=body) as answer:
                    assert answer.status == 200, await answer.text()
                    await answer.read()

        began = time.perf_counter()
        await asyncio.gather(*(user() for _ in range(at_once)))
        return len(asked) * LENGTH / (time.perf_counter() - began)


def fetched(node: Gives[Any], asked: list[TokenSequence]) -> float:
    """Tokens/s of fetching alone."""
    requests = groups(asked, REQUEST_TOKENS, REQUEST_SEQUENCES)
    began = time.perf_counter()
    for _ in fetch([node], requests, PREFETCH):
        pass
    return len(asked) * LENGTH / (time.perf_counter() - began)


def captured(node: Node, asked: list[TokenSequence]) -> float:
    """Tokens/s of a capture into shards on disk."""
    with tempfile.TemporaryDirectory(prefix="bench-capture-") as folder:
        began = time.perf_counter()
        for _ in fill([node], Path(folder), plan_shards(asked), "fp8"):
            pass
        return len(asked) * LENGTH / (time.perf_counter() - began)


def coded(node: Node, asked: list[TokenSequence]) -> float:
    """Tokens/s with the coding in the threads that fetch, nothing written."""
    return fetched(CodingNode(node, "fp8", 1), asked)


def coded_where_taken(node: Node, asked: list[TokenSequence]) -> float:
    """The same with the coding on the thread that takes the answers."""
    began = time.perf_counter()
    for states in fetch([node], groups(asked, REQUEST_TOKENS, REQUEST_SEQUENCES), PREFETCH):
        for state in states:
            encode(state, [0], "fp8")
    return len(asked) * LENGTH / (time.perf_counter() - began)


def ours(node: Node, asked: list[TokenSequence]) -> dict[str, float]:
    """Best of three of each, in turns: what else the machine does falls on all of them. Tokens/s, and the processor's
    milliseconds that the thread which takes the answers spends on 4,096 tokens."""
    ways = {"fetch": fetched, "coding": coded, "coding_where_taken": coded_where_taken, "capture": captured}
    best: dict[str, float] = {}
    for _ in range(3):
        for name, way in ways.items():
            began = time.thread_time()
            rate = way(node, asked)
            spent = 4_096_000 * (time.thread_time() - began) / (len(asked) * LENGTH)
            best[f"{name}_tokens_per_second"] = max(best.get(f"{name}_tokens_per_second", 0.0), rate)
            best[f"{name}_taker_ms"] = min(best.get(f"{name}_taker_ms", spent), spent)
    ratio = best["coding_tokens_per_second"] / best["coding_where_taken_tokens_per_second"]
    return {name: round(value, 2) for name, value in best.items()} | {"coding_in_threads_ratio": round(ratio, 3)}


@contextlib.contextmanager
def instant_node(width: int) -> Iterator[Node]:
    """A process that answers with states from its memory."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_answer_at_once, args=(there, width))
    process.start()
    try:
        yield Node(f"http://127.0.0.1:{here.recv()}", "base")
    finally:
        process.kill()
        process.join()


def _answer_at_once(port: Connection, width: int) -> None:
    values = torch.randn(LENGTH, width, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    data = values.view(torch.int16).numpy().tobytes()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            count = len(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input"])
            size = len(data)
            items = [{"index": i, "start": i * size, "end": (i + 1) * size, "shape": [LENGTH, width]}
                     for i in range(count)]  # fmt: skip
            self.send_response(200)
            self.send_header("metadata", json.dumps({"data": items}))
            self.send_header("Content-Length", str(count * size))
            self.end_headers()
            for _ in range(count):
                self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port.send(server.server_address[1])
    server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="of the environment that holds vLLM")
    parser.add_argument("--port", type=int, default=18_900)
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--engine-argument", action="append", default=[], help="--engine-argument=--X, passed to vLLM")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--local", action="store_true", help="no engine: a stand-in that answers at once")
    parser.add_argument("--width", type=int, default=4096, help="of the stand-in's states")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in the stage: the threads that fetch code, each for itself
    if options.local:
        with instant_node(options.width) as node:
            print(json.dumps(ours(node, sequences(options.sequences, 1))))
        return
    shape = SMALL if options.tiny else FULL | {"num_hidden_layers": 32}
    asked, warm = sequences(options.sequences, 1), sequences(32, 2)
    with tempfile.TemporaryDirectory(prefix="bench-capture-") as name:
        model = Path(name) / "model"
        write_model(model, shape, is_quantized=False)
        plain = ["--no-enable-prefix-caching", *options.engine_argument]
        with engine(options.python, model, options.port, plain) as url:
            asyncio.run(prefill(url, warm, 32))
            prefilled = asyncio.run(prefill(url, asked, 32))
        start = {"python": options.python, "variables": {}, "first_port": options.port + 1, "timeout_seconds": 600,
                 "arguments": ["--load-format=dummy", "--max-num-seqs=64", *options.engine_argument]}  # fmt: skip
        serve = {"dtype": "bfloat16", "max_model_len": 1024, "tensor_parallel": 1, "enforce_eager": False}
        with pooling_engine(model, start, serve, Path(name) / "log/engine.log", {}) as node:
            fetched(node, warm)
            best = ours(node, asked)
    ratios = {f"{name}_ratio_to_prefill": round(best[f"{name}_tokens_per_second"] / prefilled, 3)
                  for name in ("capture", "fetch")}  # fmt: skip
    print(json.dumps({"prefill_tokens_per_second": round(prefilled), **best, **ratios}))


if __name__ == "__main__":
    main()
