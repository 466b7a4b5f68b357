"""A stored file in chunks or lines, for what is larger than memory. Compared with its digest first."""

import random
from array import array
from collections.abc import Iterable, Iterator

from blake3 import blake3

from mansard.errors import BadInput, Corrupt
from mansard.records import SnapshotId
from mansard.store.snapshot import Blob
from mansard.store.store import Store

CHUNK_BYTES = 1 << 20


def file_lines(store: Store, snapshot: SnapshotId, path: str) -> Iterator[bytes]:
    """The file's lines without their ends, as `file_chunks` reads them."""
    return lines_of(file_chunks(store, snapshot, path))


def shuffled_lines(store: Store, snapshot: SnapshotId, path: str, key: str) -> Iterator[bytes]:
    """The lines that are not blank, in the order that `key` gives, each taken where it lies: 16 bytes a line are in
    memory."""
    begins, ends, end = array("q"), array("q"), 0
    for line in file_lines(store, snapshot, path):
        begin, end = end, end + len(line) + 1
        if line.strip():
            begins.append(begin)
            ends.append(end - 1)
    order = array("q", range(len(begins)))
    random.Random(key).shuffle(order)  # noqa: S311 - an order, not a secret
    data = store.open_object(_blob(store, snapshot, path).object)
    for number in order:
        yield bytes(data[begins[number] : ends[number]])


def lines_of(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines of chunks that belong together; nothing after a last line's end is no line."""
    parts: list[bytes] = []
    for chunk in chunks:
        goes_on, *begun = chunk.split(b"\n")
        parts.append(goes_on)
        for line in begun:
            yield b"".join(parts)
            parts = [line]
    if last := b"".join(parts):
        yield last


def file_chunks(store: Store, snapshot: SnapshotId, path: str) -> Iterator[bytes]:
    """BadInput where there is no such file (safetensors are read by tensor); Corrupt, before the first chunk, where its
    bytes are not what their digest says."""
    digest = _blob(store, snapshot, path).object
    data, hasher = store.open_object(digest), blake3()
    for chunk in _chunks(data):
        hasher.update(chunk)
    if hasher.hexdigest() != digest:
        what = f"snapshot {snapshot}: {path}: object {digest}"
        raise Corrupt(f"{what} does not match its digest; run: mansard verify")
    yield from _chunks(data)


def _blob(store: Store, snapshot: SnapshotId, path: str) -> Blob:
    file = store.manifest(snapshot).files.get(path)
    if not isinstance(file, Blob):
        raise BadInput(f"snapshot {snapshot}: no file {path!r} in it")
    return file


def _chunks(data: memoryview) -> Iterator[bytes]:
    for begin in range(0, len(data), CHUNK_BYTES):
        yield bytes(data[begin : begin + CHUNK_BYTES])
