"""Whether every number of a tensor is finite, read from its stored bytes a piece at a time. Loads no torch.

A number is NaN or infinite where all bits of its exponent are set (IEEE 754; BF16 is the upper half of F32).
"""

import numpy

from mansard.store.safetensors_header import TensorEntry
from mansard.store.store import Store

EXPONENTS = {
    "F64": ("<u8", 0x7FF0000000000000), "F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)
}  # fmt: skip
"""Type -> its words, and the bits of the exponent in them."""

_PIECE_WORDS = 1 << 22


def is_finite(store: Store, digest: str, entry: TensorEntry) -> bool:
    """True also for types that have neither NaN nor infinity."""
    if entry.dtype not in EXPONENTS or entry.size_bytes == 0:
        return True
    kind, mask = EXPONENTS[entry.dtype]
    words = numpy.frombuffer(store.open_object(digest), dtype=kind)
    bits = words.dtype.type(mask)
    return not any(
        ((words[begin : begin + _PIECE_WORDS] & bits) == bits).any() for begin in range(0, len(words), _PIECE_WORDS)
    )
