"""A text in shards trains as the same text in memory does, whatever its size, and a damaged shard is found."""

import json
import random
import shutil
import tracemalloc
from io import StringIO
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mansard.errors import BadInput, Corrupt
from mansard.models.loading import load_tokenizer
from mansard.models.tokenizer_files import take_tokenizer
from mansard.records import SnapshotId
from mansard.specs.data import Data
from mansard.specs.training import Train
from mansard.store import stream as store_stream
from mansard.store.snapshot import Blob
from mansard.store.store import Store
from mansard.store.stream import CHUNK_BYTES, file_chunks, lines_of, shuffled_lines
from mansard.training import packing, shards, stage
from mansard.training.data import Mixture, Packed, pack_texts
from mansard.training.learning import mapped_texts
from mansard.training.packing import Rows, pack, packed_rows
from mansard.training.shards import check_shards, open_shards, write_shards
from mansard.worker import Channel, StageContext
from tests.mansard.training.conftest import jsonl, texts, tokenized

ROW_TOKENS = 32


def in_memory(store: Store, base: SnapshotId, name: str, found: list[str], seed: int) -> Packed:
    return pack_texts(name, found, load_tokenizer(store.materialize(base)), ROW_TOKENS, seed)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.mark.parametrize(("shard_bytes", "seed"), [(1, 0), (300, 3), (64 << 20, 0)])
def test_batches_from_shards_are_those_of_the_text_in_memory(
    store: Store, base_folder: Path, shard_bytes: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", shard_bytes)
    base = store.snapshot(base_folder)
    documents = {name: ["", *texts(name, 40), "", "x"] for name in ("code", "prose")}
    memory = [in_memory(store, base, name, found, seed) for name, found in documents.items()]
    mapped = [
        open_shards(store, tokenized(store, base, f"data.{name}.train", jsonl(found), ROW_TOKENS, seed), name)
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


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_ranks_sees_the_batches_of_one(store: Store, base_folder: Path, world: int) -> None:
    base = store.snapshot(base_folder)
    made = tokenized(store, base, "data.code.train", jsonl(texts("code", 40)), ROW_TOKENS)
    alone = Mixture([open_shards(store, made, "code")], [1.0], 4, 0)
    ranks = [Mixture([open_shards(store, made, "code")], [1.0], 4, 0) for _ in range(world)]
    for step in (0, 3, 40):
        parts = [mixture.batch(step).of_rank(rank, world) for rank, mixture in enumerate(ranks)]
        assert {len(part.tokens_BT) for part in parts} == {4 // world}
        assert torch.equal(torch.cat([part.tokens_BT for part in parts]), alone.batch(step).tokens_BT)
        assert torch.equal(torch.cat([part.labels_BT for part in parts]), alone.batch(step).labels_BT)


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=20), max_size=12),
    st.integers(2, 7),
    st.sampled_from([None, 10]),
    st.integers(1, 30),
)
def test_rows_that_come_in_chunks_are_those_of_one_piece(
    documents: list[list[int]], row_tokens: int, bos: int | None, chunk_tokens: int
) -> None:
    whole = pack(documents, row_tokens, bos)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(packing, "CHUNK_TOKENS", chunk_tokens)
        chunks = list(packed_rows(documents, row_tokens, bos))
    assert all(0 < len(tokens) <= max(1, chunk_tokens // row_tokens) for tokens, _ in chunks)
    for kind in (0, 1):
        assert [row for chunk in chunks for row in chunk[kind].tolist()] == whole[kind].tolist()


def test_a_row_of_nothing_but_bos_is_refused() -> None:
    with pytest.raises(BadInput, match=r"data\.sequence_tokens is 1: .* 2 at the least"):
        list(packed_rows([[1, 2]], 1, 0))


@pytest.mark.parametrize(("highest", "dtype"), [(300, "<u2"), (1 << 16, "<u4")])
def test_tokens_take_the_bytes_that_the_vocabulary_needs(
    store: Store, tmp_path: Path, highest: int, dtype: str
) -> None:
    rows: Rows = numpy.array([[highest, 1, 2], [3, 4, 5]], numpy.int32)
    (folder := tmp_path / "made").mkdir()
    write_shards(folder, [(rows, rows % 3)], 3, highest, {"bytes_per_token": 2.0, "made_with": {}})
    found = open_shards(store, store.snapshot(folder), "code")
    assert json.loads((folder / "shards.json").read_bytes())["tokens_dtype"] == dtype
    assert found.rows([1, 0])[0].tolist() == rows[[1, 0]].tolist()
    assert found.rows([0])[1].tolist() == (rows % 3)[[0]].tolist()


def flip(store: Store, snapshot: SnapshotId, name: str) -> str:
    """Change one byte of a file's object; returns the object."""
    file = store.manifest(snapshot).files[name]
    assert isinstance(file, Blob)
    path = store.root / "objects" / file.object[:2] / file.object
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    return file.object


def test_a_flipped_bit_in_a_shard_is_found_before_training(store: Store, base_folder: Path) -> None:
    base = store.snapshot(base_folder)
    made = {"data.code.train": tokenized(store, base, "data.code.train", jsonl(texts("code", 40)), ROW_TOKENS)}
    check_shards(store, made)
    damaged = flip(store, made["data.code.train"], "positions-00000.bin")
    with pytest.raises(Corrupt, match=rf"data\.code\.train: .*positions-00000\.bin: .*remove .*{damaged}") as raised:
        check_shards(store, made)
    assert raised.value.exit_code == 6 and "\n" not in str(raised.value)


def training_context(store: Store, base: SnapshotId, made: SnapshotId, **data: Any) -> StageContext:
    """Of stage `train`, whose one source `code` (or another name) has `made` for both of its texts."""
    source = {"name": data.pop("name", "code"), "train": "t", "held_out": "h", "weight": 1.0, "is_domain": True}
    spec = {
        "data": {"sources": [source], "sequence_tokens": ROW_TOKENS, "seed": 0, **data},
        "train": {"tokens": 10_000, "batch_sequences": 2, "learning_rates": {"new_blocks": 1e-3}},
    }
    inputs = {"expansion": base, **{f"data.{source['name']}.{part}": made for part in ("train", "held_out")}}
    return StageContext(store, "a" * 64, inputs, spec, {}, store.work("a" * 64), Channel(StringIO()))


def opened(context: StageContext) -> None:
    mapped_texts(context, Data.model_validate(context.spec["data"]), Train.model_validate(context.spec["train"]))


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"sequence_tokens": 64}, r"data\.code\.train: tokenized with sequence_tokens 32, this training's is 64"),
        ({"seed": 7}, r"data\.code\.train: tokenized with seed 0, this training's is 7"),
        ({"name": "prose"}, r"data\.prose\.train: tokenized with source 'code', this training's is 'prose'"),
    ],
)
def test_training_refuses_shards_of_another_data_section(
    store: Store, base_folder: Path, asked: dict[str, Any], told: str
) -> None:
    base = store.snapshot(base_folder)
    made = tokenized(store, base, "data.code.train", jsonl(texts("code", 40)), ROW_TOKENS)
    opened(training_context(store, base, made))
    with pytest.raises(BadInput, match=told + "; tokenize again$") as raised:
        opened(training_context(store, base, made, **asked))
    assert "\n" not in str(raised.value)


def test_training_refuses_shards_of_another_tokenizer(store: Store, base_folder: Path, tmp_path: Path) -> None:
    """Its ids fit the vocabulary, so nothing else would notice."""
    shutil.copytree(base_folder, tmp_path / "other")
    file = tmp_path / "other/tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["merges"].pop()
    file.write_text(json.dumps(tokenizer))
    base, other = store.snapshot(base_folder), store.snapshot(tmp_path / "other")
    made = tokenized(store, other, "data.code.train", jsonl(texts("code", 40)), ROW_TOKENS)
    opened(training_context(store, other, made))
    with pytest.raises(BadInput, match=r"data\.code\.train: tokenized with tokenizer '\w+', this training's is '\w+'"):
        opened(training_context(store, base, made))


def test_training_refuses_damaged_shards(store: Store, base_folder: Path) -> None:
    base = store.snapshot(base_folder)
    made = tokenized(store, base, "data.code.train", jsonl(texts("code", 40)), ROW_TOKENS)
    flip(store, made, "tokens-00000.bin")
    with pytest.raises(Corrupt, match=r"data\.code\.train: .*tokens-00000\.bin"):
        stage.run(training_context(store, base, made))


def test_a_flipped_bit_in_a_text_is_found_while_it_is_tokenized(store: Store, base_folder: Path) -> None:
    base, text = store.snapshot(base_folder), jsonl(texts("code", 40)).replace(b"code", b"codE")
    flip(store, store.put_files({"data.jsonl": text}), "data.jsonl")
    with pytest.raises(Corrupt, match=r"data\.jsonl: object \w+ does not match its digest"):
        tokenized(store, base, "data.code.train", text, ROW_TOKENS)


def test_a_stored_file_comes_in_chunks(store: Store) -> None:
    data = bytes(range(256)) * (CHUNK_BYTES // 100)
    snapshot = store.put_files({"data.jsonl": data, "empty": b""})
    chunks = list(file_chunks(store, snapshot, "data.jsonl"))
    assert b"".join(chunks) == data and max(map(len, chunks)) == CHUNK_BYTES
    assert list(file_chunks(store, snapshot, "empty")) == []
    with pytest.raises(BadInput, match="no file 'nothing' in it"):
        list(file_chunks(store, snapshot, "nothing"))


@given(st.lists(st.binary(max_size=5), max_size=8))
def test_lines_do_not_depend_on_where_a_file_is_cut(chunks: list[bytes]) -> None:
    whole = b"".join(chunks)
    *lines, last = whole.split(b"\n")
    assert list(lines_of(chunks)) == ([*lines, last] if last else lines)


@given(lines=st.lists(st.text("ab \r", max_size=4).map(str.encode), max_size=12), ends=st.booleans())
def test_shuffled_lines_are_the_lines_shuffled(
    lines: list[bytes], ends: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = Store(tmp_path_factory.mktemp("lines") / "store")
    snapshot = store.put_files({"data.jsonl": b"\n".join(lines) + b"\n" * ends})
    wanted = [line for line in lines if line.strip()]
    random.Random("key").shuffle(wanted)
    assert list(shuffled_lines(store, snapshot, "data.jsonl", "key")) == wanted


def test_lines_are_shuffled_without_the_text_in_memory(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_stream, "CHUNK_BYTES", 1 << 16)
    snapshot = store.put_files({"data.jsonl": (b"x" * 1000 + b"\n") * 20_000})
    tracemalloc.start()
    try:
        assert sum(map(len, shuffled_lines(store, snapshot, "data.jsonl", "key"))) == 20_000_000
        assert tracemalloc.get_traced_memory()[1] < 20_000 * 32 + 8 * (1 << 16)
    finally:
        tracemalloc.stop()


def test_a_storeys_tokenizer_is_its_bases(store: Store, base_folder: Path) -> None:
    from mansard.models.expand import apply, plan
    from mansard.models.model_files import model_config
    from mansard.specs.surgery import Expand

    base = store.snapshot(base_folder)
    expansion = apply(store, base, plan(model_config(store, base), Expand(blocks=2)))
    taken = take_tokenizer(store, base)
    assert take_tokenizer(store, expansion) == taken
    alone, beside = (load_tokenizer(store.materialize(snapshot)) for snapshot in (taken, base))
    assert type(alone) is type(beside) and len(alone) == len(beside)
    text = texts("code", 1)[0]
    assert alone(text, add_special_tokens=False)["input_ids"] == beside(text, add_special_tokens=False)["input_ids"]
    assert (alone.bos_token_id, alone.eos_token_id) == (beside.bos_token_id, beside.eos_token_id)
    bare = store.put_files({"config.json": b"{}"})
    with pytest.raises(BadInput, match="no tokenizer beside its weights"):
        take_tokenizer(store, bare)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(
    store: Store, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond a batch, a chunk and 16 bytes of index a document nothing is held. A document's ids alone, as a list, take
    more than 100."""
    base = store.snapshot(base_folder)
    for module, bound in ((packing, "CHUNK_TOKENS"), (shards, "SHARD_BYTES"), (store_stream, "CHUNK_BYTES")):
        monkeypatch.setattr(module, bound, 1 << 16)  # so that both texts are many of them

    def peak(documents: int) -> int:
        line = b'{"text": "word1 word2"}\n'
        tracemalloc.start()
        try:
            tokenized(store, base, "data.code.train", line * documents, ROW_TOKENS)
            return tracemalloc.get_traced_memory()[1] - len(line) * documents  # the test's own text
        finally:
            tracemalloc.stop()

    small, large = peak(8_000), peak(32_000)
    assert large - small < 24_000 * 32
