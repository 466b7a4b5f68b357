"""A very small base, its expansion and two sources, in a real store."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

import mansard
from mansard.digest import digest_json
from mansard.records import SnapshotId
from mansard.specs.surgery import Expand
from mansard.store.store import Store
from mansard.worker import Channel, StageContext

Fill = Callable[[Store], dict[str, SnapshotId]]
ROOT = Path(mansard.__file__).resolve().parent.parent
ROW_TOKENS, BATCH_ROWS = 32, 4
SHAPE = {"vocabulary": 300, "hidden": 32, "intermediate": 64, "blocks": 2, "heads": 2, "max_tokens": 64}


def texts(word: str, documents: int) -> list[str]:
    return [f"{word} {i}: " + " ".join(f"{word}{(i * 7 + j) % 23}" for j in range(40)) for i in range(documents)]


def jsonl(documents: list[str]) -> bytes:
    rows = [{"text": text, "file": f"{i}.py"} for i, text in enumerate(documents)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mansard.demo.base import save_base, train_tokenizer, untrained_model

    folder = tmp_path_factory.mktemp("base")
    save_base(untrained_model(SHAPE, 0), train_tokenizer(texts("word", 20), SHAPE["vocabulary"], 64), folder)
    return folder


def tokenized(
    store: Store, model: SnapshotId, name: str, text: bytes, row_tokens: int, seed: int = 0
) -> SnapshotId:
    """What stage `tokenize` makes of data.jsonl with a model's tokenizer; `name` is the input's."""
    from mansard.models.tokenizer_files import take_tokenizer
    from mansard.training import tokenize_stage

    inputs = {"tokenizer": take_tokenizer(store, model), name: store.put_files({"data.jsonl": text})}
    spec = {"sequence_tokens": row_tokens, "seed": seed}
    recipe = digest_json([inputs, spec])
    context = StageContext(store, recipe, inputs, spec, {}, store.work(recipe), Channel(StringIO()))
    return tokenize_stage.run(context)


@pytest.fixture(scope="session")
def forked_ranks() -> Iterator[list[str]]:
    """The words of a launcher that starts ranks at once (forked_ranks.py); torchrun takes half a minute of CPU."""
    program = str(Path(__file__).with_name("forked_ranks.py"))
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:  # a socket's path has at most 107 bytes
        path, log = f"{folder}/socket", Path(folder, "log")
        with log.open("wb") as file:
            server = subprocess.Popen(
                [sys.executable, program, path],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        while not Path(path).is_socket():
            assert server.poll() is None, log.read_text()
        try:
            yield [sys.executable, program, path]
        finally:
            server.kill()
            server.wait()


@pytest.fixture
def fill(base_folder: Path) -> Fill:
    """Puts the inputs of stage `train` into a store, in rows of 32 tokens."""

    def put(store: Store) -> dict[str, SnapshotId]:
        from mansard.models.expand import apply, plan
        from mansard.models.model_files import model_config

        base = store.snapshot(base_folder)
        inputs = {"expansion": apply(store, base, plan(model_config(store, base), Expand(blocks=2)))}
        for name in ("code", "prose"):
            for part, found in (("train", texts(name, 30)), ("held_out", texts(name.upper(), 10))):
                inputs[f"data.{name}.{part}"] = tokenized(store, base, f"data.{name}.{part}", jsonl(found), ROW_TOKENS)
        return inputs

    return put


def slice_(steps: int, **train: Any) -> dict[str, Any]:
    """The stage's slice of a spec; keys of `train` replace those of the training section."""
    sources = [
        {"name": name, "train": name, "held_out": name, "weight": 0.5, "is_domain": name == "code"}
        for name in ("code", "prose")
    ]
    return {
        "data": {"sources": sources, "sequence_tokens": ROW_TOKENS, "min_domain_fraction": 0.3, "seed": 0},
        "train": {
            "tokens": steps * ROW_TOKENS * BATCH_ROWS, "batch_sequences": BATCH_ROWS, "precision": "fp32",
            "learning_rates": {"new_blocks": 1e-2}, "evaluate_every_steps": 4, "checkpoint_every_steps": 1, **train,
        },
    }  # fmt: skip
