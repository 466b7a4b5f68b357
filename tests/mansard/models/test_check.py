"""A base is checked in a worker before anything is made of it: finite numbers, and a tokenizer that fits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

from mansard.errors import BadInput
from mansard.launch import Request, derive, this_interpreter
from mansard.models.finite import is_finite
from mansard.models.vocabulary import check_vocabulary
from mansard.site import Site
from mansard.store.safetensors_header import TensorEntry
from mansard.store.store import Store

ROOT = Path(__file__).resolve().parents[3]
MakeCheckpoint = Callable[..., Path]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(
        path=tmp_path / "site.yaml", home=tmp_path, data=tmp_path, models=("tiny",),
        environments={"main": this_interpreter(ROOT)}, stages={"default": "main"},
    )  # fmt: skip


@pytest.mark.parametrize("number", [numpy.nan, numpy.inf, -numpy.inf])
def test_a_base_with_a_number_that_is_not_finite_is_bad_input(
    store: Store, site: Site, make_checkpoint: MakeCheckpoint, number: float
) -> None:
    from safetensors.numpy import load_file, save_file

    tree = make_checkpoint(depth=2)
    tensors = dict(load_file(tree / "model.safetensors"))
    tensors["model.layers.1.mlp.down_proj.weight"][-1, -1] = number
    save_file(tensors, tree / "model.safetensors", metadata={"format": "pt"})
    base = store.snapshot(tree)
    with pytest.raises(BadInput, match=r"'model.layers.1.mlp.down_proj.weight' holds NaN or infinity") as refused:
        derive(store, site, Request("check", {"model": base}, {}))
    assert refused.value.exit_code == 2 and "\n" not in str(refused.value)
    assert store.snapshots() == [base]


def test_a_sound_base_is_checked_once(store: Store, site: Site, make_checkpoint: MakeCheckpoint) -> None:
    base = store.snapshot(make_checkpoint(depth=2, shards=2))
    first, again = (derive(store, site, Request("check", {"model": base}, {})) for _ in range(2))
    assert (first.reused, again.reused, again.snapshot) == (False, True, first.snapshot)
    assert json.loads(store.read_file(first.snapshot, "check.json")) == {"format": 1, "finite": True, "tensors": 21}


def test_what_keys_of_a_base_are_ignored_is_recorded(
    store: Store, site: Site, make_checkpoint: MakeCheckpoint
) -> None:
    base = store.snapshot(make_checkpoint(depth=1, mystery=1))
    with pytest.raises(BadInput, match="'mystery'"):
        derive(store, site, Request("check", {"model": base}, {}))
    checked = derive(store, site, Request("check", {"model": base}, {"ignore_config_keys": ["mystery"]}))
    record = json.loads(store.read_file(checked.snapshot, "check.json"))
    assert record["ignored_config_keys"] == ["mystery"]


@pytest.mark.parametrize(
    ("dtype", "words", "expected"),
    [
        ("BF16", [0x7F7F, 0xFF7F, 0x0001], True),
        ("BF16", [0, 0x7F80], False),
        ("BF16", [0, 0xFFC0], False),
        ("F16", [0x7BFF], True),
        ("F16", [0xFC00], False),
        ("F32", [0x7F7FFFFF], True),
        ("F32", [0x7F800001], False),
        ("F64", [0x7FEFFFFFFFFFFFFF], True),
        ("F64", [0x7FF8000000000000], False),
        ("I16", [0x7C00], True),
        ("F32", [], True),
    ],
)
def test_finite_is_what_the_exponent_says(store: Store, dtype: str, words: list[int], expected: bool) -> None:
    width = {"BF16": 2, "F16": 2, "I16": 2, "F32": 4, "F64": 8}[dtype]
    data = b"".join(word.to_bytes(width, "little") for word in words)
    entry = TensorEntry("w", dtype, (len(words),), 0, len(data))
    assert is_finite(store, store.put_bytes(data), entry) is expected


def test_a_number_beyond_the_first_piece_is_found(store: Store) -> None:
    data = bytes(2 * (5 << 20)) + b"\x80\x7f"
    assert not is_finite(store, store.put_bytes(data), TensorEntry("w", "BF16", (len(data) // 2,), 0, len(data)))


def tokenizer(vocabulary: Any, *added: dict[str, Any]) -> bytes:
    return json.dumps({"model": {"vocab": vocabulary}, "added_tokens": list(added)}).encode()


def test_a_special_token_beyond_the_vocabulary_is_let_through() -> None:
    image = {"content": "<image>", "id": 4, "special": True}
    check_vocabulary({"vocab_size": 4}, tokenizer({"a": 0, "b": 3, "<image>": 4}, image))
    check_vocabulary({"vocab_size": 4}, tokenizer([["a", 0.0]] * 4))
    check_vocabulary({"vocab_size": 4}, b"{}")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (tokenizer({"a": 0, "b": 4, "c": 9}), r"token 'b' .and 1 more. has the number 4, but config.json's vocab_size"),
        (tokenizer([["a", 0.0]] * 5), "token 'a' has the number 4"),
        (tokenizer({}, {"content": "<x>", "id": 7, "special": False}), "token '<x>' has the number 7"),
        (b"[]", "a JSON object is expected"),
        (tokenizer({"a": "x"}), "not a tokenizer's file"),
        (tokenizer({}, {"id": 7}), "not a tokenizer's file"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(BadInput, match=words) as refused:
        check_vocabulary({"vocab_size": 4}, data)
    assert "\n" not in str(refused.value)
