"""Small Hugging Face checkpoints without torch: a Llama of random half-precision tensors."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from safetensors.numpy import save_file

from mansard.models.families import LLAMA
from mansard.store.store import Store
from tests.mansard.postgres_server import PostgresServer, postgres_binaries
from tests.mansard.s3_server import environment, make_bucket, s3_server

# The same examples on every run, and no clock: a slow machine must not fail a test.
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")

MakeCheckpoint = Callable[..., Path]
HIDDEN, INTERMEDIATE, VOCABULARY, HEADS = 16, 24, 32, 4


LONGEST = (
    "test_story.py", "test_host.py", "test_killed.py", "test_ranks.py", "test_branch_slots.py", "test_adapters.py",
    "test_servers.py", "test_qwen3.py", "test_launch.py",
)  # fmt: skip
"""Files that took above 100 s in a run of the whole suite on a busy machine (2026-11-30), the longest first."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where workers share the files: the longest first, then those with engines, then the other slow ones, so that many
    short ones are left when one worker runs out. What is to run, and the order within a file, stay as they are."""
    if not hasattr(config, "workerinput"):
        return
    ranks: dict[Path, int] = {}
    for item in items:
        marks = (i for i, mark in enumerate(("engine", "slow")) if item.get_closest_marker(mark))
        rank = len(LONGEST) + next(marks, 2)
        if item.path.name in LONGEST:
            rank = LONGEST.index(item.path.name)
        ranks[item.path] = min(rank, ranks.get(item.path, rank))
    items.sort(key=lambda item: ranks[item.path])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    """A real S3 server, for the session."""
    with s3_server() as url:
        yield url


@pytest.fixture
def bucket_url(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new, empty bucket; the environment names its server."""
    for name, value in environment(s3_url).items():
        monkeypatch.setenv(name, value)
    name = f"store-{uuid4().hex[:12]}"
    make_bucket(s3_url, name)
    return f"s3://{name}/some/prefix"


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """make_checkpoint(depth=3, shards=1, extra_tensors={}, **config) -> a new folder with a Llama."""
    count = 0

    def make(
        depth: int = 3, shards: int = 1, extra_tensors: Mapping[str, np.ndarray] | None = None, **config: Any
    ) -> Path:
        nonlocal count
        count += 1
        folder = tmp_path / f"llama-{count}"
        folder.mkdir()
        whole = {**_config(depth), **config}
        (folder / "config.json").write_text(json.dumps(whole))
        (folder / "tokenizer.json").write_text("{}")
        _write_weights(folder, {**_tensors(whole, depth), **(extra_tensors or {})}, shards)
        return folder

    return make


def _config(depth: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": depth,
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "vocab_size": VOCABULARY,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "tie_word_embeddings": False,
    }  # fmt: skip


def _tensors(config: dict[str, Any], depth: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    names = list(LLAMA.outer_tensors(config))
    names += [LLAMA.block_tensor(b, n) for b in range(depth) for n in LLAMA.block_tensors(config, 0)]
    return {name: random.standard_normal(_shape(name)).astype(np.float16) for name in names}


def _shape(name: str) -> tuple[int, ...]:
    rows = {"gate_proj": INTERMEDIATE, "up_proj": INTERMEDIATE, "embed_tokens": VOCABULARY, "lm_head": VOCABULARY}
    layer, kind = name.split(".")[-2:]
    out = rows.get(layer, HIDDEN)
    if kind == "bias" or "norm" in layer:
        return (out,)
    return (out, INTERMEDIATE if layer == "down_proj" else HIDDEN)


def _write_weights(folder: Path, tensors: dict[str, np.ndarray], shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    files = {f"model-{i + 1:05}-of-{shards:05}.safetensors": names[i::shards] for i in range(shards)}
    for file, inside in files.items():
        save_file({n: tensors[n] for n in inside}, folder / file, metadata={"format": "pt"})
    index = {
        "metadata": {
            "total_size": sum(t.nbytes for t in tensors.values()),
            "total_parameters": sum(t.size for t in tensors.values()),
        },
        "weight_map": {n: file for file, inside in files.items() for n in inside},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One server for all tests that ask for it."""
    binaries = postgres_binaries()
    if binaries is None:
        pytest.skip("left out: the journal on PostgreSQL; no initdb here (Debian: apt-get install postgresql)")
    server = PostgresServer(binaries)
    try:
        server.start()
        yield server
    finally:
        server.close()
