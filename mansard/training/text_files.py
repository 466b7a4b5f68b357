"""Files of text as people have them: JSON lines, Parquet, plain text; checked early, read document by document.

A path is a file, or a folder whose files are one text in the order of their names. A .txt file is one document; every
row of the others is one. Every mistake is one line: the key of the spec, the file, the row, what would be right.
"""

import codecs
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mansard.errors import BadInput

CHUNK_BYTES = 1 << 20
PARQUET_ROWS = 256
"""Rows in memory at a time."""


@dataclass(frozen=True, slots=True)
class Document:
    """`file` is the name of the file that it comes from."""

    text: str
    file: str


@dataclass(frozen=True, slots=True)
class Format:
    """How files of one kind are checked (the cheap part: first row, columns, encoding) and read."""

    check: Callable[[Path, str, str], None]
    read: Callable[[Path, str, str], Iterator[str]]


def files_of(path: Path, where: str) -> list[Path]:
    """The files of one text, in order; BadInput where there are none, or they are of several kinds."""
    if not path.is_dir():
        return [path]
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    kinds = sorted({file.suffix for file in files})
    if len(kinds) != 1:
        found = f"files of several kinds ({', '.join(kinds)})" if kinds else "no files"
        raise BadInput(f"{where}: {path} holds {found}; a folder of .jsonl, of .parquet or of .txt files is expected")
    return files


def format_of(file: Path) -> Format:
    return FORMATS.get(file.suffix, JSONL)


def check_files(path: Path, column: str, where: str) -> None:
    """BadInput for what can be seen without reading a whole text."""
    for file in files_of(path, where):
        format_of(file).check(file, column, where)


def documents(files: list[Path], column: str, where: str) -> Iterator[Document]:
    """Every document of the files. BadInput where a row holds no string."""
    for file in files:
        for text in format_of(file).read(file, column, where):
            yield Document(text, file.name)


def _check_jsonl(path: Path, column: str, where: str) -> None:
    _check_utf8(path, where)
    with _opened(path, where) as file:
        first = file.readline()
    if not first.strip():
        raise BadInput(f"{where}: {path} is empty; one JSON object with {column} a line is expected")
    _text_of_line(first, column, f"{where}: {path}:1")


def _read_jsonl(path: Path, column: str, where: str) -> Iterator[str]:
    with _opened(path, where) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _text_of_line(line, column, f"{where}: {path}:{number}")


def _text_of_line(line: bytes, column: str, place: str) -> str:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise BadInput(f"{place}: not UTF-8; save the file as UTF-8") from error
    except ValueError as error:
        raise BadInput(f"{place}: not JSON; one object with {column} a line is expected") from error
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        raise BadInput(f"{place}: no {column} in it; one object with {column}, a string, a line is expected")
    return str(row[column])


def _check_txt(path: Path, column: str, where: str) -> None:
    if _check_utf8(path, where) == 0:
        raise BadInput(f"{where}: {path} is empty; a document is expected")


def _read_txt(path: Path, column: str, where: str) -> Iterator[str]:
    with _opened(path, where) as file:
        data = file.read()
    try:
        yield data.decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{where}: {path} is not UTF-8, at byte {error.start}") from error


def _check_parquet(path: Path, column: str, where: str) -> None:
    with _parquet(path, column, where) as file:
        if file.metadata.num_rows == 0:
            raise BadInput(f"{where}: {path} is empty; one document a row is expected")


def _read_parquet(path: Path, column: str, where: str) -> Iterator[str]:
    import pyarrow

    number = 0
    with _parquet(path, column, where) as file:
        try:
            for batch in file.iter_batches(PARQUET_ROWS, columns=[column]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str):
                        raise BadInput(f"{where}: {path}: row {number} of {column} is {text!r:.60}, not a string")
                    yield text
                    number += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise BadInput(f"{where}: {path}: damaged after row {number}: {_line(error)}") from error


def _parquet(path: Path, column: str, where: str) -> Any:  # noqa: ANN401 - a pyarrow.parquet.ParquetFile
    """Opened, with a column of strings. pyarrow is loaded here, where a spec names such a file."""
    import pyarrow
    from pyarrow.parquet import ParquetFile
    from pyarrow.types import is_large_string, is_string, is_string_view

    with _opened(path, where):  # the same words for a file that is not there
        pass
    try:
        file = ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInput(f"{where}: {path} is not Parquet: {_line(error)}") from error
    if column not in file.schema_arrow.names:
        file.close()
        known = ", ".join(file.schema_arrow.names[:10])
        raise BadInput(f"{where}: {path} has no column {column}; it has {known}: name one with column")
    kind = file.schema_arrow.field(column).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not any(is_it(kind) for is_it in (is_string, is_large_string, is_string_view)):
        file.close()
        raise BadInput(f"{where}: {path}: column {column} holds {kind}, strings are expected")
    return file


def _check_utf8(path: Path, where: str) -> int:
    """How many bytes were looked at: the file's first, however long it is, because a spec is checked in a second; the
    rest is decoded where it becomes tokens. BadInput where these are not UTF-8."""
    with _opened(path, where) as file:
        data: bytes = file.read(CHUNK_BYTES)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data, final=len(data) < CHUNK_BYTES)
    except UnicodeDecodeError as error:
        raise BadInput(f"{where}: {path} is not UTF-8, at byte {error.start}") from error
    return len(data)


def _opened(path: Path, where: str) -> Any:  # noqa: ANN401 - a binary file
    try:
        return path.open("rb")
    except OSError as error:
        raise BadInput(f"{where}: cannot read {path}: {error.strerror}; it is relative to the site's data") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


JSONL = Format(_check_jsonl, _read_jsonl)
FORMATS = {".parquet": Format(_check_parquet, _read_parquet), ".txt": Format(_check_txt, _read_txt)}
"""By suffix; every other is JSON lines."""
