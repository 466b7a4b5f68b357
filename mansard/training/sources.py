"""A source's text, taken into the store as one `data.jsonl`, whatever it was: everything that reads text reads that.

A file of JSON lines is taken as it is. Anything else is written out once, {"file", "text"} a line, and remembered by
the digests of what it was made from, so that asking again writes nothing. A file that changes while it is taken is
refused; after that it may change as it likes: a run reads the store.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mansard.canonical import canonical_json
from mansard.digest import digest_file, digest_json
from mansard.errors import BadInput
from mansard.records import SnapshotId
from mansard.specs.data import SourceText
from mansard.store.objects import file_state
from mansard.store.snapshot import Blob, Manifest
from mansard.store.store import Store
from mansard.training.hub_text import check_hub, hub_rows
from mansard.training.text_files import JSONL, Document, check_files, documents, files_of, format_of

TEXT_FILE = "data.jsonl"
TAKING = "take-text"
"""What a conversion is called in recipes and lineage."""
FORMAT = 1


def check_text(text: SourceText, folder: Path, where: str) -> None:
    """BadInput, naming the key `where` and the file, for what a glance finds. `folder` is the site's data."""
    if text.path is not None:
        check_files(folder / text.path, text.column, where)
    else:
        check_hub(str(text.hub), where)


def take_text(store: Store, text: SourceText, folder: Path, where: str) -> SnapshotId:
    """The snapshot of its data.jsonl. BadInput names the file and row that cannot be used."""
    if text.path is None:
        assert text.hub is not None and text.split is not None, "the spec has checked it"
        rows = hub_rows(text.hub, text.config, text.revision, text.split, text.column, where)
        found = (Document(row, text.hub) for row in rows)
        return _converted(store, text.model_dump(mode="json"), found, where)
    files = files_of(folder / text.path, where)
    if len(files) == 1 and format_of(files[0]) is JSONL and text.column == "text":
        return _listed(store, files[0], where)
    states = _states(files, where)
    taken = {"files": [[file.name, digest_file(file)] for file in files], "column": text.column}
    return _converted(store, taken, _unchanged(documents(files, text.column, where), files, states, where), where)


def _converted(store: Store, taken: Mapping[str, Any], found: Iterable[Document], where: str) -> SnapshotId:
    """Written out, or remembered."""
    recipe = digest_json({"stage": TAKING, "format": FORMAT, **taken})
    with store.lock(recipe):
        known = store.recall(recipe)
        if known is not None:
            return known
        begun_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        file = store.work(recipe) / TEXT_FILE
        has_text = False
        with file.open("wb") as lines:
            for document in found:
                has_text = has_text or bool(document.text.strip())
                lines.write(line_of(document, where))
        if not has_text:
            raise BadInput(f"{where}: no text in it")
        snapshot = _listed(store, file, where)
        record = {"format": 1, "stage": TAKING, "recipe": recipe, "inputs": {}, "spec": dict(taken)}
        store.remember(recipe, snapshot, {**record, "code_version": FORMAT, "begun_at": begun_at})
        store.discard_work(recipe)
    return snapshot


def line_of(document: Document, where: str) -> bytes:
    """The line of data.jsonl. BadInput for half a surrogate pair, which JSON can escape and UTF-8 cannot hold."""
    try:
        return canonical_json({"file": document.file, "text": document.text}) + b"\n"
    except UnicodeEncodeError as error:
        begin = f"{document.text[:40]!a}"
        raise BadInput(f"{where}: {document.file}: {begin}: half of an escaped surrogate pair; mend it") from error


def _listed(store: Store, file: Path, where: str) -> SnapshotId:
    states = _states([file], where)
    digest = store.put_file(file)
    _check_unchanged([file], states, where)
    return store.put_manifest(Manifest({TEXT_FILE: Blob(digest, states[0][0])}))


State = tuple[int, int, int]


def _states(files: list[Path], where: str) -> list[State]:
    try:
        return [file_state(file) for file in files]
    except OSError as error:
        raise BadInput(f"{where}: cannot read {error.filename}: {error.strerror}") from error


def _unchanged(
    found: Iterable[Document], files: list[Path], states: list[State], where: str
) -> Iterator[Document]:
    """The documents; BadInput at the end where a file is no longer what it was."""
    yield from found
    _check_unchanged(files, states, where)


def _check_unchanged(files: list[Path], states: list[State], where: str) -> None:
    for file, before, after in zip(files, states, _states(files, where), strict=True):
        if after != before:
            raise BadInput(f"{where}: {file} changed while it was read; wait until nobody writes it, then run again")
