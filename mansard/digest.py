"""BLAKE3 digests, written as 64 hex digits."""

import mmap
from pathlib import Path
from typing import Any

from blake3 import blake3

from mansard.canonical import canonical_json

_ZERO_CHUNK = bytes(1 << 20)


def digest_bytes(data: bytes | memoryview | mmap.mmap) -> str:
    return blake3(data).hexdigest()


def digest_json(value: Any) -> str:  # noqa: ANN401 - any JSON value
    """Digest of the canonical JSON of `value`."""
    return digest_bytes(canonical_json(value))


def digest_file(path: Path) -> str:
    """Digest of a file's bytes, read through a memory map."""
    return blake3().update_mmap(path).hexdigest()


def digest_zeros(size_bytes: int) -> str:
    """Digest of `size_bytes` zero bytes, in constant memory."""
    hasher = blake3()
    whole, rest = divmod(size_bytes, len(_ZERO_CHUNK))
    for _ in range(whole):
        hasher.update(_ZERO_CHUNK)
    return hasher.update(_ZERO_CHUNK[:rest]).hexdigest()
