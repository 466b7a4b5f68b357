"""Text in any form becomes the same data.jsonl in the store, and what cannot be used is one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow.parquet import write_table
from pydantic import ValidationError

from mansard.errors import BadInput
from mansard.records import SnapshotId
from mansard.specs.data import Source, SourceText
from mansard.store.store import Store
from mansard.training.data import read_texts
from mansard.training.hub_text import check_hub, hub_rows
from mansard.training.sources import check_text, take_text

TEXTS = ["one", "", "zwei\n\nZeilen", "三\u2028行", "fünf"]
COMMIT = "0" * 40


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def taken(store: Store, folder: Path, **place: str) -> list[str]:
    text = SourceText(**place)
    check_text(text, folder, "here")
    return texts_in(store, take_text(store, text, folder, "here"))


def texts_in(store: Store, snapshot: SnapshotId) -> list[str]:
    return read_texts(store.read_file(snapshot, "data.jsonl"), "x")


def parquet(path: Path, **columns: list[Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return path


def test_parquet_gives_its_column_row_by_row(store: Store, tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", body=TEXTS, number=[1, 2, 3, 4, 5])
    assert taken(store, tmp_path, path="a.parquet", column="body") == TEXTS
    write_table(pyarrow.table({"text": pyarrow.array(TEXTS).dictionary_encode()}), tmp_path / "b.parquet")
    assert taken(store, tmp_path, path="b.parquet") == TEXTS


def test_a_folder_is_one_text_in_the_order_of_its_names(store: Store, tmp_path: Path) -> None:
    for number in (2, 0, 1):
        parquet(tmp_path / f"rows/train-{number:05}-of-00003.parquet", text=[f"{number} a", f"{number} b"])
    assert taken(store, tmp_path, path="rows") == ["0 a", "0 b", "1 a", "1 b", "2 a", "2 b"]


def test_a_text_file_is_one_document(store: Store, tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    for name, text in (("b", "second\n\nparagraph\n"), ("a", "first")):
        (tmp_path / f"books/{name}.txt").write_text(text)
    assert taken(store, tmp_path, path="books") == ["first", "second\n\nparagraph\n"]
    assert taken(store, tmp_path, path="books/b.txt") == ["second\n\nparagraph\n"]


def test_json_lines_are_taken_as_they_are_and_from_another_column_written_out(store: Store, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", TEXTS)
    snapshot = take_text(store, SourceText(path="a.jsonl"), tmp_path, "here")
    assert store.read_file(snapshot, "data.jsonl") == file.read_bytes()
    jsonl(tmp_path / "b.jsonl", TEXTS, "body")
    assert taken(store, tmp_path, path="b.jsonl", column="body") == TEXTS


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_a_data_set_is_streamed_through_datasets(store: Store, tmp_path: Path, kind: str) -> None:
    """Offline: a data set folder as the Hub holds one, through the same call."""
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        rows = [f"{split} {text}" for text in TEXTS]
        if kind == "json":
            jsonl(folder / f"{split}.jsonl", rows)
        else:
            parquet(folder / f"{split}-00000-of-00001.parquet", text=rows)
    assert list(hub_rows(str(folder), None, None, "test", "text", "here")) == [f"test {text}" for text in TEXTS]
    with pytest.raises(BadInput, match=r"here: .*no column body; it has text"):
        list(hub_rows(str(folder), None, None, "train", "body", "here"))
    with pytest.raises(BadInput, match=r"here: .* split dev: .*dev") as raised:
        list(hub_rows(str(folder), None, None, "dev", "text", "here"))
    assert "\n" not in str(raised.value)


def test_a_folder_of_this_machine_is_no_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("owner/name", "parquet"):
        with pytest.raises(BadInput, match=r"no OWNER/NAME of the Hub"):
            check_hub(name, "here")


def write(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("a.parquet", lambda path: None, "cannot read .*a.parquet: No such file"),
        ("a.parquet", write(b"PAR1 no, text"), "a.parquet is not Parquet"),
        ("a.parquet", lambda path: parquet(path, body=["x"]), "no column text; it has body"),
        ("a.parquet", lambda path: parquet(path, text=[1, 2]), "column text holds int64, strings are expected"),
        ("a.parquet", lambda path: parquet(path, text=pyarrow.array([], "string")), "is empty; one document a row"),
        ("a.parquet", lambda path: parquet(path, text=["x", "y", None]), "row 2 of text is None, not a string"),
        ("a.parquet", lambda path: parquet(path, text=["", " "]), "no text in it"),
        ("a.txt", write(b""), "a.txt is empty; a document is expected"),
        ("a.txt", write(b" \n"), "no text in it"),
        ("a.txt", write(b"x\xff"), "a.txt is not UTF-8"),
        ("a.jsonl", write(b'{"words": "x"}'), "a.jsonl:1: no text in it"),
        ("a", lambda path: path.mkdir(), "holds no files; a folder of .jsonl"),
        ("a", lambda path: [path.mkdir(), (path / "b.txt").touch(), (path / "c.jsonl").touch()], "several kinds"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(
    store: Store, tmp_path: Path, name: str, make: Callable[[Path], object], message: str
) -> None:
    make(tmp_path / name)
    with pytest.raises(BadInput, match=f"here: .*{message}" if "no text in it" not in message else message) as raised:
        taken(store, tmp_path, path=name)
    assert "\n" not in str(raised.value)
    assert store.snapshots() == []


def test_a_row_in_the_middle_is_named(store: Store, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"body": "x"}\n\n{"body": 3}\n')
    with pytest.raises(BadInput, match=r"here: .*a\.jsonl:3: no body in it"):
        taken(store, tmp_path, path="a.jsonl", column="body")
    (tmp_path / "b.jsonl").write_bytes(b'{"body": "\\ud800"}\n')
    with pytest.raises(BadInput, match=r"here: b\.jsonl: '\\ud800': half of an escaped surrogate pair"):
        taken(store, tmp_path, path="b.jsonl", column="body")
    with pytest.raises(BadInput, match=r"x: line 1: half of an escaped surrogate pair"):
        read_texts(b'{"text": "\\ud800"}', "x")


@pytest.mark.parametrize("chunk_bytes", range(11, 17))
def test_a_character_that_crosses_the_end_of_what_is_checked_is_no_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr("mansard.training.text_files.CHUNK_BYTES", chunk_bytes)
    (tmp_path / "data.jsonl").write_text('{"text": "äöü – 漢字"}\n', encoding="utf-8")
    check_text(SourceText(path="data.jsonl"), tmp_path, "here")


def test_a_specs_check_looks_at_the_beginning_of_a_text_and_its_tokens_need_all_of_it(tmp_path: Path) -> None:
    data = b'{"text": "word"}\n' * 70_000 + b"\xff\n"
    (tmp_path / "data.jsonl").write_bytes(data)
    check_text(SourceText(path="data.jsonl"), tmp_path, "here")
    with pytest.raises(BadInput, match=f"data.code.train: byte {len(data) - 2} is not UTF-8"):
        read_texts(data, "data.code.train")


def test_a_source_that_changes_while_it_is_taken_is_refused(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = parquet(tmp_path / "a.parquet", text=[f"document {i}" for i in range(2000)])
    text = SourceText(path="a.parquet")
    from mansard.training import sources, text_files

    def cut_short(*asked: Any) -> Any:
        for number, document in enumerate(text_files.documents(*asked)):
            if number == 100:
                parquet(file, text=["another"])
            yield document

    with monkeypatch.context() as patched:
        patched.setattr(sources, "documents", cut_short)
        with pytest.raises(BadInput, match=r"here: .*a\.parquet(: damaged after row|.* changed while it was read)"):
            take_text(store, text, tmp_path, "here")
    assert store.snapshots() == []
    assert texts_in(store, take_text(store, text, tmp_path, "here")) == ["another"]


def test_json_lines_that_change_before_they_are_read_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "first"}\n')

    class Late(Store):
        def put_file(self, path: Path) -> str:
            file.write_text('{"text": "another, of another size"}\n')
            return super().put_file(path)

    with pytest.raises(BadInput, match=r"here: .*data\.jsonl changed while it was read"):
        take_text(Late(tmp_path / "store"), SourceText(path="data.jsonl"), tmp_path, "here")


def test_what_was_written_out_once_is_remembered_by_its_bytes(store: Store, tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", text=TEXTS)
    text = SourceText(path="a.parquet")
    snapshot = take_text(store, text, tmp_path, "here")
    assert take_text(store, text, tmp_path, "here") == snapshot
    [record] = store.lineage(snapshot)
    assert record["spec"]["files"][0][0] == "a.parquet"
    parquet(tmp_path / "a.parquet", text=TEXTS[:-1])
    assert texts_in(store, take_text(store, text, tmp_path, "here")) == TEXTS[:-1]


def test_two_columns_of_one_file_are_two_texts(store: Store, tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", text=TEXTS, body=[f"{text} in full" for text in TEXTS])
    for column, wanted in (("text", TEXTS), ("body", [f"{text} in full" for text in TEXTS])):
        taken = take_text(store, SourceText(path="a.parquet", column=column), tmp_path, "here")
        assert texts_in(store, taken) == wanted


def test_a_path_is_written_back_as_it_was_read() -> None:
    source = {"name": "a", "train": "a.jsonl", "held_out": {"path": "b.parquet", "column": "body"},
              "weight": 1.0, "is_domain": True}  # fmt: skip
    assert Source.model_validate(source).model_dump(mode="json") == source
    hub = {"hub": "owner/name", "revision": COMMIT, "split": "train", "column": "text"}
    assert SourceText.model_validate(hub).model_dump(mode="json") == hub


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({}, "exactly one of path, hub"),
        ({"path": "a", "hub": "owner/name"}, "exactly one of path, hub"),
        ({"hub": "owner/name"}, "go together"),
        ({"hub": "owner/name", "revision": "main", "split": "train"}, "pattern"),
        ({"path": "a", "split": "train"}, "go together"),
    ],
)
def test_a_place_that_is_none_is_refused(place: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SourceText.model_validate(place)
