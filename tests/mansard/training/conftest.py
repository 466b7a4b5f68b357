"""A very small base, its expansion and two sources, in a real store."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mansard.records import SnapshotId
from mansard.specs import Expand
from mansard.store import Store

Fill = Callable[[Store], dict[str, SnapshotId]]
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


@pytest.fixture
def fill(base_folder: Path) -> Fill:
    """Puts the inputs of stage `train` into a store."""

    def put(store: Store) -> dict[str, SnapshotId]:
        from mansard.models.expand import apply, plan
        from mansard.models.model_files import model_config

        base = store.snapshot(base_folder)
        inputs = {"expansion": apply(store, base, plan(model_config(store, base), Expand(blocks=2)))}
        for name in ("code", "prose"):
            inputs[f"data.{name}.train"] = store.put_files({"data.jsonl": jsonl(texts(name, 30))})
            inputs[f"data.{name}.held_out"] = store.put_files({"data.jsonl": jsonl(texts(name.upper(), 10))})
        return inputs

    return put
