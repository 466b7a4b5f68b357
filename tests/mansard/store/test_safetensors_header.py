import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from mansard.errors import BadInput
from mansard.store.safetensors_header import (
    DTYPE_BITS,
    compose_header,
    header_metadata,
    header_prefix,
    parse_header_text,
    parse_safetensors_header,
)

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "F16", "shape": [2, 1], "data_offsets": [8, 12]}


def write(path: Path, header: bytes, data: bytes) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(BadInput) as caught:
        parse_safetensors_header(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < len(str(path)) + 600
    return message


def test_what_the_reference_writes_is_read_back_exactly(tmp_path: Path) -> None:
    tensors = {"a": np.ones((2, 3), np.float32), "b": np.zeros((0, 4), np.int64), "c": np.array(3, np.uint8)}
    data = save(tensors, metadata={"format": "pt"})
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    text, entries = parse_safetensors_header(path)
    assert data.startswith(header_prefix(text))
    assert {e.name: e.shape for e in entries} == {n: t.shape for n, t in tensors.items()}
    assert header_metadata(text) == {"format": "pt"}


def test_names_may_stand_in_any_order(tmp_path: Path) -> None:
    path = write(tmp_path / "x", json.dumps({"b": B, "a": A}).encode(), bytes(12))
    assert [e.name for e in parse_safetensors_header(path)[1]] == ["a", "b"]


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        ({"a": A, "b": {**B, "data_offsets": [4, 8]}}, "overlaps"),
        ({"a": A, "b": {**B, "data_offsets": [0, 4]}}, "overlaps"),
        ({"a": {**A, "data_offsets": [4, 12]}}, "hole"),
        ({"a": A, "b": {**B, "shape": [1], "data_offsets": [9, 11]}}, "hole"),
        ({"a": A}, "bytes that no tensor owns"),
        ({"a": A, "b": {**B, "shape": [4], "data_offsets": [8, 16]}}, "truncated"),
        ({"a": {**A, "shape": [3]}}, "takes 12 bytes"),
        ({"a": {**A, "data_offsets": [-8, 0]}}, "data_offsets"),
        ({"a": {**A, "data_offsets": [8, 0]}}, "data_offsets"),
        ({"a": {**A, "data_offsets": [0, 8, 9]}}, "data_offsets"),
        ({"a": {**A, "data_offsets": [0.0, 8.0]}}, "data_offsets"),
        ({"a": {**A, "shape": [-2]}}, "shape"),
        ({"a": {**A, "shape": [True, 2]}}, "shape"),
        ({"a": {**A, "shape": [2**40, 2**40]}}, "larger than any file"),
        ({"a": {**A, "shape": [2**62] * 1000}}, "larger than any file"),
        ({"a": {**A, "shape": [2**62] * 100_000}}, "takes more than 65536 characters"),
        ({"a": A, "__metadata__": {"k": "v" * 10_000_001}}, "__metadata__ takes more than"),
        ({"a": A, "__metadata__": {"k": "\ud800"}}, "__metadata__"),
        ({"a": {**A, "dtype": "F31"}}, "unknown dtype"),
        ({"a": {**A, "dtype": ["F32"]}}, "unknown dtype"),
        ({"a": {**A, "dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}, "whole number of bytes"),
        ({"a": {**A, "more": 1}}, "keys"),
        ({"a": [1, 2]}, "keys"),
        ({"a": A, "__metadata__": {"k": 1}}, "__metadata__"),
        ({"a": A, "__metadata__": ["k"]}, "__metadata__"),
        ({"a\ud800": A}, "surrogate"),
        ([], "is expected"),
    ],
)
def test_a_wrong_header_is_refused_in_one_line(tmp_path: Path, header: object, complaint: str) -> None:
    assert complaint in refusal(write(tmp_path / "x", json.dumps(header).encode(), bytes(12)))


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        (b"", "begins with"),
        (b"{", "not JSON"),
        (b" {}", "begins with"),
        (b'{"a":' * 1_000_000, "nested too deep"),
        (b'{"a":' + b"[" * 1_000_000, "nested too deep"),
        (b'{"a\xff":1}', "not UTF-8"),
        (b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}' % (b"9" * 5000), "not JSON"),
        (json.dumps({"a": A}).encode()[:-1] + b"," + json.dumps({"a": A}).encode()[1:], "twice"),
        (b'{"__metadata__":{"k":"","k":""}}', "twice"),
        (b'{"__metadata__":{"k":""', "not JSON"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},}', "not JSON"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}}', "not JSON"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}\0', "not JSON"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]};', "not JSON"),
        (b'{"a" {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "not JSON"),
        (b'{"a\n":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "not JSON"),
        (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "twice"),
    ],
)
def test_a_broken_header_is_refused_in_one_line(tmp_path: Path, header: bytes, complaint: str) -> None:
    assert complaint in refusal(write(tmp_path / "x", header, bytes(8)))


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = save({"a": np.arange(3, dtype=np.float32), "b": np.arange(5, dtype=np.int8)})
    path = tmp_path / "x"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refusal(path)


@pytest.mark.parametrize(
    ("claimed", "complaint"), [(2**63, "at most"), (100_000_001, "at most"), (99_999_999, "trunc")]
)
def test_a_huge_header_is_refused_without_reading_it(tmp_path: Path, claimed: int, complaint: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(claimed.to_bytes(8, "little") + b"{}")
    assert complaint in refusal(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / "absent")


@given(
    tensors=st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(lambda n: n != "__metadata__"),
        st.tuples(st.sampled_from(sorted(DTYPE_BITS)), st.lists(st.integers(0, 4), max_size=3).map(tuple)),
        max_size=6,
    ),
    metadata=st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=4), st.text(st.characters(codec="utf-8"))),
)
def test_a_composed_header_is_parsed_back(
    tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    whole = {n: (d, (*s, 8) if DTYPE_BITS[d] % 8 else s) for n, (d, s) in tensors.items()}
    text, entries = compose_header(metadata, whole)
    assert len(header_prefix(text)) % 8 == 0
    assert {
        e.name: (e.dtype, e.shape) for e in parse_header_text(text, "x", sum(e.size_bytes for e in entries))
    } == whole
    assert header_metadata(text) == metadata


def test_the_reference_reads_a_composed_header(tmp_path: Path) -> None:
    whole = {"a.long": ("I64", (2,)), "b": ("F32", (2, 2)), "é": ("U8", (3,)), "a": ("F16", ())}
    text, entries = compose_header({"format": "pt"}, whole)
    path = tmp_path / "x.safetensors"
    path.write_bytes(header_prefix(text) + bytes(sum(e.size_bytes for e in entries)))
    assert {n: t.shape for n, t in load_file(path).items()} == {n: s for n, (_, s) in whole.items()}


def test_every_known_dtype_is_one_of_the_reference() -> None:
    with pytest.raises(Exception, match="unknown variant") as caught:
        from safetensors import deserialize

        deserialize(header_prefix('{"a":{"dtype":"X","shape":[],"data_offsets":[0,0]}}'))
    assert set(re.findall(r"`(\w+)`", str(caught.value))) - {"X"} == set(DTYPE_BITS)
