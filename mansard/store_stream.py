"""A stored file's bytes in chunks, for what is larger than memory. Compared with its digest first."""

from collections.abc import Iterator

from blake3 import blake3

from mansard.errors import BadInput, Corrupt
from mansard.records import SnapshotId
from mansard.snapshot import Blob
from mansard.store import Store

CHUNK_BYTES = 1 << 20


def file_chunks(store: Store, snapshot: SnapshotId, path: str) -> Iterator[bytes]:
    """BadInput where there is no such file (safetensors are read by tensor); Corrupt, before the first chunk, where its
    bytes are not what their digest says."""
    file = store.manifest(snapshot).files.get(path)
    if not isinstance(file, Blob):
        raise BadInput(f"snapshot {snapshot}: no file {path!r} in it")
    data = store.open_object(file.object)
    hasher = blake3()
    for chunk in _chunks(data):
        hasher.update(chunk)
    if hasher.hexdigest() != file.object:
        what = f"snapshot {snapshot}: {path}: object {file.object}"
        raise Corrupt(f"{what} does not match its digest; run: mansard verify")
    yield from _chunks(data)


def _chunks(data: memoryview) -> Iterator[bytes]:
    for begin in range(0, len(data), CHUNK_BYTES):
        yield bytes(data[begin : begin + CHUNK_BYTES])
