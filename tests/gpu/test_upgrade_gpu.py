"""Train -> fuse -> quantize -> serve of a three-block model in each precision, each stage in a worker of its own.

That is how kernels come to differ: training leaves its process with another preference than a fresh one has. On an
accelerator; MANSARD_GPU_TESTS_ON=cpu runs the same on a CPU, without FP8. MANSARD_SERVE_PYTHON names the interpreter
that has vLLM (MANSARD_SERVE_PYTHONPATH: with these folders); without it, serving is left out with a line.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from mansard.launch import Request, derive
from mansard.serving.engine.command import EngineIdentity, command, free_port, variables
from mansard.serving.engine.log import last_words
from mansard.site import Site
from mansard.site_sections import EngineSite, Environment
from mansard.specs.whole import Serve
from mansard.stages import declaration
from mansard.store.store import Store

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # libraries warn of their own ways
]
ROOT = Path(__file__).resolve().parents[2]
STAGES = ("expand", "prove", "tokenize", "train", "fuse", "quantize")
ROW_TOKENS, BATCH_ROWS, STEPS = 64, 8, 12
START_SECONDS = 600.0
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("float32", {"precision": "fp32"}),
    "bf16": ("bfloat16", {"precision": "bf16"}),
    "fp8": ("bfloat16", {"precision": "bf16", "frozen": "fp8", "new_blocks": "fp8"}),
    "rounded": ("bfloat16", {"precision": "bf16", "optimizer": "adamw_8bit", "master": "stochastic_rounding"}),
}
"""Type of the checkpoint, keys of the training section."""
PROMPT = "def area(width, height):\n"


@pytest.fixture(scope="module")
def device() -> str:
    import torch

    device = os.environ.get("MANSARD_GPU_TESTS_ON") or ("cuda" if torch.cuda.is_available() else "")
    if not device:
        pytest.skip("no accelerator (MANSARD_GPU_TESTS_ON=cpu runs it on a CPU)")
    return device


@pytest.fixture(scope="module")
def site(device: str, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Workers of this interpreter, held to the versions that are installed: a GPU machine has other builds."""
    home = tmp_path_factory.mktemp("home")
    packages = sorted({package for stage in STAGES for package in declaration(stage).packages})
    lock = home / "lock.txt"
    lock.write_text("".join(f"{package}=={version(package)}\n" for package in packages))
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    path = os.environ.get("MANSARD_SERVE_PYTHONPATH")
    serve = Environment(Path(os.environ.get("MANSARD_SERVE_PYTHON", sys.executable)), lock,
                        {"PYTHONPATH": path} if path else {})  # fmt: skip
    main = Environment(Path(sys.executable), lock, hidden)
    return Site(home / "site.yaml", home, home, ("tiny",), {"main": main, "serve": serve}, {"default": "main"},
                engine=EngineSite(environment="serve"))  # fmt: skip


@pytest.fixture(scope="module", params=list(CASES))
def upgrade(request: pytest.FixtureRequest, device: str, site: Site) -> dict[str, Any]:
    """Every stage's snapshot of one case."""
    if request.param == "fp8" and not has_fp8(device):
        pytest.skip("no FP8 units here")
    dtype, train = CASES[request.param]
    store = Store(site.store)
    expanded = {"blocks": 1, "positions": "even"}
    base = store.snapshot(base_folder(site.home / f"base-{dtype}", dtype))

    def run(stage: str, inputs: dict[str, str], spec: dict[str, Any]) -> str:
        return derive(store, site, Request(stage, inputs, spec)).snapshot

    from mansard.models.tokenizer_files import take_tokenizer

    expansion = run("expand", {"model": base}, expanded)
    proof = run("prove", {"base": base, "expansion": expansion}, {"probe_tokens": 32, "seed": 0, "form": "logits"})
    text, tokenizer = store.put_files({"data.jsonl": lines()}), take_tokenizer(store, base)
    data = {f"data.code.{part}": run("tokenize", {"tokenizer": tokenizer, f"data.code.{part}": text},
                                     {"sequence_tokens": ROW_TOKENS, "seed": 0})
            for part in ("train", "held_out")}  # fmt: skip
    trained = run("train", {"expansion": expansion, **data}, train_slice(train))
    fused = run("fuse", {"expansion": expansion, "trained": trained}, {"method": "residual"})
    quantize = {"scheme": "awq", "group_size": 64, "symmetric": False, "source": "code", "samples": 16,
                "sample_tokens": ROW_TOKENS, "seed": 0}  # fmt: skip
    artifact = run("quantize", {"model": fused, "data": text}, quantize)
    return {"dtype": dtype, "store": store, "proof": proof, "trained": trained, "fused": fused, "artifact": artifact}


def has_fp8(device: str) -> bool:
    import torch

    return device == "cuda" and torch.cuda.get_device_capability() >= (8, 9)


def base_folder(folder: Path, dtype: str) -> Path:
    """Two blocks of random weights: with the new one, three."""
    if folder.exists():
        return folder
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mansard.demo.base import train_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.05, bos_token_id=0, eos_token_id=1,
        tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    train_tokenizer([PROMPT * 20], 320, 512).save_pretrained(folder)
    return folder


def lines() -> bytes:
    code = [PROMPT + "".join(f"    side{j} = width * {i * 7 + j} + height\n" for j in range(12)) for i in range(60)]
    return "".join(json.dumps({"text": text, "file": f"{i}.py"}) + "\n" for i, text in enumerate(code)).encode()


def train_slice(train: dict[str, Any]) -> dict[str, Any]:
    source = {"name": "code", "train": "code", "held_out": "code", "weight": 1.0, "is_domain": True}
    return {
        "data": {"sources": [source], "sequence_tokens": ROW_TOKENS, "min_domain_fraction": 0.3, "seed": 0},
        "train": {"tokens": STEPS * BATCH_ROWS * ROW_TOKENS, "batch_sequences": BATCH_ROWS,
                  "learning_rates": {"new_blocks": 1e-3}, "evaluate_every_steps": 6, "checkpoint_every_steps": 6,
                  **train},
    }  # fmt: skip


def record(upgrade: dict[str, Any], snapshot: str, file: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(upgrade["store"].read_file(upgrade[snapshot], file))
    return content


def test_what_was_trained_is_fused_and_quantized(device: str, upgrade: dict[str, Any]) -> None:
    """Fuse compares bytes: it ended here, on Hopper, before kernels had names."""
    dtype = upgrade["dtype"]
    expected = {"cpu": {"cpu"}}.get(device, {"flash"} if dtype == "bfloat16" else {"efficient", "math"})
    training, proof = record(upgrade, "trained", "training.json"), record(upgrade, "proof", "proof.json")
    assert training["probe"]["kernel"] in expected and proof["kernels"][dtype] in expected
    assert training["probe"]["trainer_kernel"] == ("cpu" if device == "cpu" else "cudnn,flash,efficient,math")
    assert training["curve"][-1]["bits_per_byte"]["code"] < training["curve"][0]["bits_per_byte"]["code"]
    quantization = record(upgrade, "artifact", "quantization.json")
    assert quantization["probe"]["kernel"] in expected
    assert 0.0 < quantization["kl_nats_per_token"] < 0.5
    assert quantization["matrices"] == 3 * 7


@pytest.fixture
def endpoint(upgrade: dict[str, Any], site: Site, device: str) -> Iterator[str]:
    """vLLM on the artifact, as the host starts it."""
    python, given = site.environments["serve"].python, os.environ.get("MANSARD_SERVE_PYTHON")
    serve_variables = {**os.environ, **variables(site, "")}
    finds = [str(python), "-c", "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"]
    if given is None or subprocess.run(finds, env=serve_variables, check=False).returncode:
        pytest.skip(f"serving is left out: no vLLM (MANSARD_SERVE_PYTHON={given})")
    identity = EngineIdentity(upgrade["artifact"], "tiny", Serve(max_model_len=256))
    port, log = free_port(8300 + os.getpid() % 500, ()), site.home / f"engine-{upgrade['artifact'][:12]}.log"
    cache = ["--gpu-memory-utilization=0.05", f"--kv-cache-memory-bytes={1 << 28}"] if device == "cuda" else []
    with upgrade["store"].using(upgrade["artifact"]) as tree, log.open("wb") as file:
        process = subprocess.Popen(command(identity, tree, port, site, cache), stdin=subprocess.DEVNULL, stdout=file,
                                   stderr=file, env=serve_variables, start_new_session=True)  # fmt: skip
        try:
            wait_for_models(process, port, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for_models(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.25)
    pytest.fail(f"the engine does not serve (exit status {process.poll()}): {last_words(log)}")


@pytest.mark.engine
def test_the_artifact_is_served(endpoint: str) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "temperature": 0.0, "logprobs": 1, "echo": True}
    asked = urllib.request.Request(f"{endpoint}/v1/completions", json.dumps(body).encode(),
                                   {"content-type": "application/json"})  # fmt: skip
    with urllib.request.urlopen(asked, timeout=120) as answer:
        choice = json.loads(answer.read())["choices"][0]
    numbers = choice["logprobs"]["token_logprobs"]
    assert choice["text"].startswith(PROMPT) and len(numbers) > 8
    assert all(-50.0 < number <= 0.0 for number in numbers[1:])
