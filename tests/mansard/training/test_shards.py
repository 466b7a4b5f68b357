"""A text in shards trains as the same text in memory does, whatever its size, and a damaged shard is found."""

from pathlib import Path

import pytest
import torch

from mansard.models.loading import load_tokenizer
from mansard.records import SnapshotId
from mansard.store import Store
from mansard.training import shards
from mansard.training.data import Mixture, Packed, pack_texts
from mansard.training.shards import open_shards
from tests.mansard.training.conftest import jsonl, texts, tokenized

ROW_TOKENS = 32


def in_memory(store: Store, base: SnapshotId, name: str, found: list[str]) -> Packed:
    return pack_texts(name, found, load_tokenizer(store.materialize(base)), ROW_TOKENS, 0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.mark.parametrize("shard_bytes", [1, 300, 64 << 20])
def test_batches_from_shards_are_those_of_the_text_in_memory(
    store: Store, base_folder: Path, shard_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", shard_bytes)
    base = store.snapshot(base_folder)
    documents = {name: ["", *texts(name, 40), "", "x"] for name in ("code", "prose")}
    memory = [in_memory(store, base, name, found) for name, found in documents.items()]
    mapped = [
        open_shards(store, tokenized(store, base, f"data.{name}.train", jsonl(found), ROW_TOKENS), name)
        for name, found in documents.items()
    ]
    for one, other in zip(memory, mapped, strict=True):
        assert len(one) == len(other) and one.bytes_per_token == other.bytes_per_token
        assert other.highest_token >= one.tokens_RT.max()
    expected, found_ = (Mixture(found, [0.6, 0.4], 4, 0) for found in (memory, mapped))
    for step in (0, 1, 7, 100):
        one, other = expected.batch(step), found_.batch(step)
        assert torch.equal(one.tokens_BT, other.tokens_BT)
        assert torch.equal(one.positions_BT, other.positions_BT)
        assert torch.equal(one.labels_BT, other.labels_BT)
