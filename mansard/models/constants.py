"""Objects that hold one value throughout: what silences the last factors of a new block."""

import struct

from mansard.digest import digest_bytes, digest_zeros
from mansard.store.safetensors_header import TensorEntry
from mansard.store.store import Store


def one_value(value: float, dtype: str) -> bytes:
    """One element of a tensor. BF16 is the upper half of F32, exact for the values that families use."""
    if dtype == "BF16":
        return struct.pack("<f", value)[2:]
    return struct.pack({"F64": "<d", "F32": "<f", "F16": "<e"}[dtype], value)


def constant_digest(value: float, like: TensorEntry) -> str:
    """The digest of a tensor of the type and shape of `like` that holds `value` throughout."""
    if value == 0.0:
        return digest_zeros(like.size_bytes)
    element = one_value(value, like.dtype)
    return digest_bytes(element * (like.size_bytes // len(element)))


class Constants:
    """Objects by value, type and size; a plan needs few of them many times."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._digests: dict[tuple[float, str, int], str] = {}

    def of(self, value: float, like: TensorEntry) -> str:
        """The digest of a tensor of the same type and shape; zeros take no room on the disk."""
        key = (value, like.dtype, like.size_bytes)
        if key not in self._digests:
            self._digests[key] = self._put(*key)
        return self._digests[key]

    def _put(self, value: float, dtype: str, size_bytes: int) -> str:
        if value == 0.0:
            return self._store.put_zeros(size_bytes)
        element = one_value(value, dtype)
        return self._store.put_bytes(element * (size_bytes // len(element)))
