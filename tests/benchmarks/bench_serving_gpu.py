"""The upgraded shape (32 + 8 blocks of a Llama-2-7B) served in bf16 and in W4A16, through the router, on one GPU.

Real vLLM engines with dummy weights and CUDA graphs, one after the other; random prompts of token ids, so that the
prefix cache helps nobody; every request streams through our router. The seed article names 280 ms on average and 120
tokens/s for its model. The last line is JSON: for each scheme and load mean/p50/p99 latency and time to first token
in ms, requests/s and tokens/s, and single_user_ratio (W4A16's decoding tokens/s over bf16's). --tiny: a small shape, to
try the plumbing on a CPU.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from mansard.serving.split import Split, with_stable, write_split

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 32_000
FULL = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 40, "num_attention_heads": 32}
TINY = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
W4A16_ASYM = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 128},
        }
    },
}
SITE = """
format: 1
home: home
data: data
models: [bench]
environments: {main: {python: /usr/bin/env, lock: none}, serve: {python: /usr/bin/env, lock: none}}
stages: {default: main}
ports: {router: 0}
"""
START_SECONDS = 300


def write_model(folder: Path, shape: dict[str, int], is_quantized: bool) -> None:
    """A config and a tokenizer of one word an id; the weights are vLLM's dummies."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    config = LlamaConfig(
        **shape,
        num_key_value_heads=shape["num_attention_heads"],
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    written = {**config.to_dict(), **({"quantization_config": W4A16_ASYM} if is_quantized else {})}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(written))
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", bos_token="w1", eos_token="w2").save_pretrained(
        folder
    )


@contextlib.contextmanager
def engine(python: str, model: Path, port: int, arguments: list[str]) -> Iterator[str]:
    """A vLLM engine that answers /health; its endpoint."""
    command = [python, "-m", "vllm.entrypoints.openai.api_server", f"--model={model}", "--served-model-name=bench"]
    command += ["--load-format=dummy", "--dtype=bfloat16", "--host=127.0.0.1", f"--port={port}", "--max-model-len=1024"]
    command += ["--max-num-seqs=64", "--no-enable-log-requests", "--disable-uvicorn-access-log", *arguments]
    endpoint, end = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    with subprocess.Popen(command, stdout=sys.stderr) as child:
        try:
            while not _is_ready(endpoint):
                if child.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"{model.name}: the engine did not start")
                time.sleep(0.5)
            yield endpoint
        finally:
            child.terminate()


def _is_ready(endpoint: str) -> bool:
    try:
        with urllib.request.urlopen(f"{endpoint}/health", timeout=2):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def router(folder: Path, endpoint: str) -> Iterator[str]:
    """Our router's worker in front of one engine."""
    (folder / "home").mkdir(parents=True)
    write_split(folder / "home/split.json", with_stable(Split(), "bench", 1, endpoint, "bench", 1))
    site = folder / "site.yaml"
    site.write_text(SITE)
    command = [sys.executable, "-m", "mansard.serving.router.worker", "--lease-seconds", "86400", "--site", str(site)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as child:
        try:
            assert child.stdout is not None
            yield f"http://127.0.0.1:{json.loads(child.stdout.readline())['port']}"
        finally:
            child.kill()


async def _one(session: aiohttp.ClientSession, url: str, prompt: int, output: int, model: str) -> tuple[float, float]:
    """Seconds to the first token and to the end of one streamed completion."""
    ids = [random.randrange(3, VOCABULARY) for _ in range(prompt)]
    asked = {"model": model, "prompt": ids, "max_tokens": output, "ignore_eos": True, "stream": True}
    start, first = time.perf_counter(), 0.0
    async with session.post(f"{url}/v1/completions", json=asked) as answer:
        assert answer.status == 200, await answer.text()
        async for line in answer.content:
            if not first and line.startswith(b"data: "):
                first = time.perf_counter() - start
    return first, time.perf_counter() - start


async def load(
    url: str, users: int, requests: int, prompt: int, output: int, models: Sequence[str] = ("bench",)
) -> dict[str, float]:
    """`users` at once, each asking anew as its answer ends, `requests` in all, the models in turn; times in ms, rates a
    second."""
    seen: list[tuple[float, float]] = []
    left = iter(range(requests))
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def user() -> None:
            for number in left:
                seen.append(await _one(session, url, prompt, output, models[number % len(models)]))

        start = time.perf_counter()
        await asyncio.gather(*(user() for _ in range(users)))
        seconds = time.perf_counter() - start
    ends = sorted(end * 1000 for _, end in seen)
    return {
        "mean_ms": round(statistics.mean(ends), 1),
        "p50_ms": round(statistics.median(ends), 1),
        "p99_ms": round(ends[min(len(ends) - 1, int(len(ends) * 0.99))], 1),
        "first_token_p50_ms": round(statistics.median(first for first, _ in seen) * 1000, 1),
        "decode_tokens_per_second": round(statistics.median((output - 1) / (end - first) for first, end in seen), 1),
        "requests_per_second": round(requests / seconds, 3),
        "tokens_per_second": round(requests * output / seconds, 1),
    }


def measure(options: argparse.Namespace, folder: Path, scheme: str, port: int) -> dict[str, Any]:
    """One engine's loads through the router, after a warm-up."""
    model = folder / scheme
    write_model(model, TINY if options.tiny else FULL, scheme == "w4a16")
    prompt, output = (32, 8) if options.tiny else (options.prompt, options.output)
    figures: dict[str, Any] = {}
    place = folder / f"router-{scheme}"
    with engine(options.python, model, port, options.engine_argument) as endpoint, router(place, endpoint) as url:
        asyncio.run(load(url, 2, 4, prompt, output))
        for users in options.users:
            figures[f"{users}"] = asyncio.run(load(url, users, max(6, 4 * users), prompt, output))
            print(scheme, users, figures[f"{users}"], flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="of the environment that holds vLLM")
    parser.add_argument("--users", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--port", type=int, default=18_700)
    parser.add_argument("--engine-argument", action="append", default=[], help="--engine-argument=--X, passed to vLLM")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as name:
        schemes = {s: measure(options, Path(name), s, options.port + n) for n, s in enumerate(("bf16", "w4a16"))}
    rates = [schemes[s][f"{options.users[0]}"]["decode_tokens_per_second"] for s in ("w4a16", "bf16")]
    print(json.dumps({**schemes, "single_user_ratio": round(rates[0] / rates[1], 3)}))


if __name__ == "__main__":
    main()
