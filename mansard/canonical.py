"""Canonical JSON: the same value is always the same bytes. Standard library only (on-call commands use it)."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def canonical_json(value: Any) -> bytes:  # noqa: ANN401 - any JSON value
    """Sorted keys, no white space, UTF-8, no NaN (raises ValueError)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_json(value: Any) -> str:  # noqa: ANN401 - any JSON value
    """Hex SHA-256 of the canonical JSON; the journal's chain uses it so that it needs no third-party package."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def write_atomically(path: Path, data: bytes, mode: int = 0o644) -> None:
    """A reader sees the old file or the new one, never half."""
    with replaced_atomically(path, mode) as file:
        file.write(data)


@contextmanager
def replaced_atomically(path: Path, mode: int = 0o644) -> Iterator[BinaryIO]:
    """Write beside; at the end fsync, rename, fsync the folder. Nothing is left of it where the body raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        with open(beside, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        folder = os.open(path.parent, os.O_RDONLY)  # before the rename: without a free descriptor the old file stays
        try:
            beside.replace(path)
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
