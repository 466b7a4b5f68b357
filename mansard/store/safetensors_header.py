"""The header of a safetensors file: read with full validation, and written anew for tensors that move.

Guarantees: entries that are returned tile the file's data exactly (no hole, no overlap), each entry's bytes agree with
its dtype and shape, names are unique. Everything else is one BadInput line that names the file. It never reads tensor
data. The order of names in the JSON is free, as in the format's reference implementation; only the offsets count.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mansard.errors import BadInput

MAX_HEADER_BYTES = 100_000_000
"""The reference implementation's limit (safetensors, tensor.rs, MAX_HEADER_SIZE)."""

MAX_TENSORS = 1_000_000
MAX_ENTRY_CHARACTERS = 1 << 16
MAX_METADATA_CHARACTERS = 10_000_000
"""What no real model comes near (128 experts in 94 layers are 37,000 tensors), so that a hostile header of the largest
size cannot fill the memory: `make fuzz` measures what reading one takes."""

DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_MAX_OFFSET = 2**63 - 1
_BLANKS = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file; `begin` and `end` are byte offsets in the data that follows the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.begin


def parse_safetensors_header(path: Path) -> tuple[str, tuple[TensorEntry, ...]]:
    """The exact header text (padding included) and the entries in the order of their data."""
    claim = "the header claims"
    try:
        with path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            length = file.read(_LENGTH_BYTES)
            header_bytes = int.from_bytes(length, "little")
            if len(length) < _LENGTH_BYTES:
                raise BadInput(
                    f"{path}: truncated: {size_bytes} bytes; a safetensors file begins with 8 bytes of length"
                )
            if header_bytes > MAX_HEADER_BYTES:
                raise BadInput(f"{path}: {claim} {header_bytes} bytes; at most {MAX_HEADER_BYTES} are allowed")
            if header_bytes > size_bytes - _LENGTH_BYTES:
                raise BadInput(f"{path}: truncated: {claim} {header_bytes} bytes, the file has {size_bytes}")
            raw = file.read(header_bytes)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}; a readable safetensors file is expected") from error
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: the safetensors header is not UTF-8 (byte {error.start}); JSON is expected") from error
    del raw
    return text, parse_header_text(text, str(path), size_bytes - _LENGTH_BYTES - header_bytes)


def parse_header_text(text: str, where: str, data_bytes: int) -> tuple[TensorEntry, ...]:
    """The entries in the order of their data; `data_bytes` is what follows the header. BadInput begins with `where`."""
    entries = [_entry(name, value, where) for name, value in _parts(text, where) if name != _METADATA]
    entries.sort(key=lambda e: (e.begin, e.end, e.name))
    expected = 0
    for entry in entries:
        if entry.begin != expected:
            what = "overlaps the tensor before it" if entry.begin < expected else "leaves a hole before it"
            raise BadInput(
                f"{where}: tensor {entry.name!r:.200} begins at byte {entry.begin} and {what}: {expected} is expected"
            )
        expected = entry.end
    if expected != data_bytes:
        what = "truncated" if expected > data_bytes else "bytes that no tensor owns"
        raise BadInput(f"{where}: {what}: the header describes {expected} bytes of data, the file has {data_bytes}")
    return tuple(entries)


def header_metadata(text: str) -> dict[str, str]:
    """The free text entries (`__metadata__`) of a header that was parsed before."""
    return next((dict(value) for name, value in _parts(text, "header") if name == _METADATA), {})


def compose_header(
    metadata: Mapping[str, str], tensors: Mapping[str, tuple[str, tuple[int, ...]]]
) -> tuple[str, tuple[TensorEntry, ...]]:
    """A header for `tensors` (name -> dtype, shape), in the reference writer's order: wide dtypes first (so that every
    tensor stays aligned), then by name. The text is padded with spaces to a multiple of 8 bytes."""
    entries: list[TensorEntry] = []
    position = 0
    for name, (dtype, shape) in sorted(
        tensors.items(), key=lambda item: (-DTYPE_BITS[item[1][0]], item[1][0], item[0])
    ):
        end = position + tensor_bytes(dtype, shape)
        entries.append(TensorEntry(name, dtype, shape, position, end))
        position = end
    tree: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    for entry in entries:
        tree[entry.name] = {
            "dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [entry.begin, entry.end]
        }  # fmt: skip
    text = json.dumps(tree, separators=(",", ":"), ensure_ascii=False)
    return text + " " * (-len(text.encode()) % _LENGTH_BYTES), tuple(entries)


def header_prefix(text: str) -> bytes:
    """The bytes of a file before its tensor data: length, header."""
    raw = text.encode()
    return len(raw).to_bytes(_LENGTH_BYTES, "little") + raw


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; ValueError where the bits are no whole number of bytes or no file could hold them."""
    bits = DTYPE_BITS[dtype]
    for length in shape:
        bits *= length
        if bits > 8 * _MAX_OFFSET:
            raise ValueError(f"shape {list(shape[:8])} is larger than any file")
    if bits % 8:
        raise ValueError(f"{bits} bits of {dtype} are no whole number of bytes")
    return bits // 8


def _parts(text: str, where: str) -> Iterator[tuple[str, Any]]:
    """(name, value) of the header's object, one at a time, so that no hostile text grows in memory: a tensor's value is
    decoded from at most MAX_ENTRY_CHARACTERS, metadata as pairs of text."""
    if not text.startswith("{"):
        raise BadInput(f"{where}: the safetensors header begins with {text[:8]!r}; '{{' is expected")
    seen: set[str] = set()
    place, mark = 1, ","
    while mark == ",":
        place = _skip_blanks(text, place)
        if not seen and text[place : place + 1] == "}":
            place, mark = place + 1, "}"
            break
        name, place = _name(text, place, where)
        if name in seen:
            raise BadInput(f"{where}: the safetensors header names {name!r:.200} twice; each name stands once")
        seen.add(name)
        if len(seen) > MAX_TENSORS:
            raise BadInput(f"{where}: the safetensors header names more than {MAX_TENSORS} tensors")
        value, place = (_metadata if name == _METADATA else _value)(text, place, where, name)
        yield name, value
        place = _skip_blanks(text, place)
        mark, place = text[place : place + 1], place + 1
    if mark != "}" or _skip_blanks(text, place) != len(text):
        raise _not_json(where, place - 1, "',' or the end of the object is expected")


def _name(text: str, place: int, where: str) -> tuple[str, int]:
    """A name with its colon, and where its value begins."""
    name, place = _string(text, place, where)
    place = _skip_blanks(text, place)
    if text[place : place + 1] != ":":
        raise _not_json(where, place, "':' is expected")
    return name, _skip_blanks(text, place + 1)


def _string(text: str, place: int, where: str) -> tuple[str, int]:
    if text[place : place + 1] != '"':
        raise _not_json(where, place, "text in double quotes is expected")
    try:
        value, end = json.JSONDecoder().raw_decode(text, place)
    except ValueError as error:
        raise _not_json(where, place, str(error)) from error
    assert isinstance(value, str), "what begins with a double quote is text"
    return value, end


def _value(text: str, place: int, where: str, name: str) -> tuple[Any, int]:
    piece = text[place : place + MAX_ENTRY_CHARACTERS]
    try:
        value, used = json.JSONDecoder(object_pairs_hook=_unique).raw_decode(piece)
    except RecursionError as error:
        raise BadInput(f"{where}: the safetensors header is nested too deep; three levels are expected") from error
    except _Twice as error:
        raise BadInput(f"{where}: tensor {name!r:.200} has the key {error} twice; each stands once") from error
    except ValueError as error:
        if len(piece) == MAX_ENTRY_CHARACTERS:
            raise BadInput(
                f"{where}: tensor {name!r:.200} takes more than {MAX_ENTRY_CHARACTERS} characters of the header"
            ) from error
        raise _not_json(where, place, str(error)) from error
    return value, place + used


def _metadata(text: str, place: int, where: str, name: str) -> tuple[dict[str, str], int]:
    """An object of texts only."""
    begin, found = place, {}
    seen = text[begin : begin + 60]
    expected = f"{where}: {name} is {seen!r:.80}; a mapping of text to text is expected"
    if text[place : place + 1] != "{":
        raise BadInput(expected)
    place, mark = _skip_blanks(text, place + 1), ","
    if text[place : place + 1] == "}":
        return {}, place + 1
    while mark == ",":
        key, place = _name(text, _skip_blanks(text, place), where)
        if text[place : place + 1] != '"':
            raise BadInput(expected)
        value, place = _string(text, place, where)
        if key in found:
            raise BadInput(f"{where}: {name} names {key!r:.200} twice; each name stands once")
        if not _is_text(key + value):
            raise BadInput(expected)
        found[key] = value
        if place - begin > MAX_METADATA_CHARACTERS:
            raise BadInput(f"{where}: {name} takes more than {MAX_METADATA_CHARACTERS} characters of the header")
        place = _skip_blanks(text, place)
        mark, place = text[place : place + 1], place + 1
    if mark != "}":
        raise _not_json(where, place - 1, f"',' or the end of {name} is expected")
    return found, place


class _Twice(ValueError):
    """A key that an object has twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(f"{next(name for name in tree if names.count(name) > 1)!r:.200}")
    return tree


def _skip_blanks(text: str, place: int) -> int:
    found = _BLANKS.match(text, place)
    assert found is not None, "a pattern that takes nothing too always matches"
    return found.end()


def _not_json(where: str, place: int, what: str) -> BadInput:
    return BadInput(f"{where}: the safetensors header is not JSON at character {place}: {what:.200}")


def _entry(name: str, value: Any, where: str) -> TensorEntry:  # noqa: ANN401 - any JSON value
    place = f"{where}: tensor {name!r:.200}"
    if not _is_text(name):
        raise BadInput(f"{place}: the name has a lone surrogate; UTF-8 text is expected")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise BadInput(f"{place}: {str(value)!r:.80}; the keys dtype, shape and data_offsets are expected")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise BadInput(f"{place}: unknown dtype {str(dtype)!r:.80}; known: {', '.join(DTYPE_BITS)}")
    if not _are_counts(shape):
        raise BadInput(f"{place}: shape {str(shape)!r:.80}; a list of whole numbers from 0 up is expected")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise BadInput(f"{place}: data_offsets {str(offsets)!r:.80}; [begin, end] with 0 <= begin <= end is expected")
    try:
        size_bytes = tensor_bytes(dtype, tuple(shape))
    except ValueError as error:
        raise BadInput(f"{place}: {error}") from error
    if offsets[1] - offsets[0] != size_bytes:
        raise BadInput(
            f"{place}: {dtype} of shape {shape!s:.80} takes {size_bytes} bytes, "
            f"data_offsets give it {offsets[1] - offsets[0]}"
        )
    return TensorEntry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _are_counts(value: Any) -> bool:  # noqa: ANN401 - any JSON value
    return isinstance(value, list) and all(type(v) is int and 0 <= v <= _MAX_OFFSET for v in value)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
