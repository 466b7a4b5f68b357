"""Capture's throughput beside plain prefill of the same tokens: one model, vLLM in both modes, one after the other.

Prefill: completions of one token, no prefix cache, so many at once that batches are full. Capture: a pooling engine,
our fetching with its prefetch, states coded in fp8 as a capture keeps them. Dummy weights, random tokens, a 7B shape on
a GPU; --tiny: a small shape on a CPU. The last line is JSON: tokens/s, capture_ratio_to_prefill, and
fetch_ratio_to_prefill without the coding.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
import numpy
import torch
from bench_serving_gpu import FULL, VOCABULARY, engine, write_model

from mansard.carry_on.capture_stage import PREFETCH, REQUEST_SEQUENCES, REQUEST_TOKENS
from mansard.carry_on.fetching import fetch
from mansard.carry_on.nodes import Node
from mansard.carry_on.pooling_engine import pooling_engine
from mansard.carry_on.sequences import TokenSequence, groups, key_of
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


def capture(node: Node, asked: list[TokenSequence], is_coded: bool = True) -> float:
    """Tokens/s."""
    requests = groups(asked, REQUEST_TOKENS, REQUEST_SEQUENCES)
    began = time.perf_counter()
    for states in fetch([node], requests, PREFETCH):
        if is_coded:
            encode(torch.cat(states), [i * LENGTH for i in range(len(states))], "fp8")
    return len(asked) * LENGTH / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="of the environment that holds vLLM")
    parser.add_argument("--port", type=int, default=18_900)
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--engine-argument", action="append", default=[], help="--engine-argument=--X, passed to vLLM")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
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
            capture(node, warm)
            fetched = capture(node, asked, is_coded=False)
            captured = capture(node, asked)
    print(json.dumps({"prefill_tokens_per_second": round(prefilled), "capture_tokens_per_second": round(captured),
                      "capture_ratio_to_prefill": round(captured / prefilled, 3),
                      "fetch_ratio_to_prefill": round(fetched / prefilled, 3)}))  # fmt: skip


if __name__ == "__main__":
    main()
