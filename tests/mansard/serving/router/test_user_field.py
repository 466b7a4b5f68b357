"""The body's `user`, without a server: the same answer as a JSON parser's, and a bounded cost whatever is sent."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mansard.serving.router import user_field
from mansard.serving.router.user_field import MAX_USER_BYTES, WINDOW_BYTES, model_of, user_of
from mansard.serving.split import key_digest

MESSAGES = [{"role": "user", "content": 'she wrote "user": "eve" and {"user": "eve"} \\'}] * 3
NAMES = st.sampled_from(["user", "usér", "role", 'x"user', "user\\", '\\"user', "messages", "User", "a:b"])
TRICKS = ['"user": "eve"', '\\"user":', '{"user":"eve"}', "}]", "\\", '"']
TEXTS = st.one_of(st.text(max_size=12), st.sampled_from(TRICKS))
TREES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(NAMES, inner, max_size=4)),
    max_leaves=12,
)


def expected(tree: Any) -> str:
    user = tree.get("user") if isinstance(tree, dict) else None
    return user if isinstance(user, str) and 0 < len(user.encode()) <= MAX_USER_BYTES else ""


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=300)
@given(TREES, st.booleans(), st.sampled_from([None, 2]))
def test_what_is_read_is_what_a_parser_reads(tree: Any, is_ascii: bool, indent: int | None) -> None:
    body = json.dumps(tree, ensure_ascii=is_ascii, indent=indent).encode()
    assert user_of(body) == expected(tree)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=300)
@given(st.dictionaries(NAMES, TREES, min_size=1, max_size=6), st.integers(8, 200))
def test_beyond_the_windows_nobody_else_is_read(tree: dict[str, Any], window: int) -> None:
    """What a smaller window does not see counts as absent; a nested user, or one in a text, never counts."""
    usual, user_field.WINDOW_BYTES = user_field.WINDOW_BYTES, window
    try:
        assert user_of(json.dumps(tree).encode()) in ("", expected(tree))
    finally:
        user_field.WINDOW_BYTES = usual


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=300)
@given(st.dictionaries(NAMES | st.just("model"), TREES, min_size=1, max_size=6), st.booleans(), st.integers(2, 100))
def test_a_model_is_read_in_slices_as_a_parser_reads_it(tree: dict[str, Any], is_ascii: bool, size: int) -> None:
    usual = user_field.WINDOW_BYTES, user_field.SLICE_BYTES
    user_field.WINDOW_BYTES, user_field.SLICE_BYTES = 2, size
    try:
        model = tree.get("model")
        right = model if isinstance(model, str) and 0 < len(model.encode()) <= MAX_USER_BYTES else ""
        assert asyncio.run(model_of(json.dumps(tree, ensure_ascii=is_ascii).encode())) == right
    finally:
        user_field.WINDOW_BYTES, user_field.SLICE_BYTES = usual


PIECES = st.sampled_from([b'"user"', b":", b'"', b"\\", b"{", b"}", b"a"])


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(st.binary(), st.lists(PIECES).map(b"".join)))
def test_any_bytes_give_a_key_and_no_error(body: bytes) -> None:
    key_digest("tiny", user_of(body))


@pytest.mark.parametrize("order", [("user", "messages"), ("messages", "user")])
def test_a_megabyte_of_messages_hides_nobody_on_either_side(order: tuple[str, str]) -> None:
    parts = {"user": "ann", "messages": MESSAGES * 4000}
    body = json.dumps({"model": "tiny", **{name: parts[name] for name in order}, "stream": True}).encode()
    assert len(body) > 1_000_000
    assert user_of(body) == "ann"


def test_in_the_middle_of_a_large_body_it_counts_as_absent() -> None:
    filler = "x" * (WINDOW_BYTES + 10)
    assert user_of(json.dumps({"prompt": filler, "user": "ann", "suffix": filler}).encode()) == ""


@pytest.mark.parametrize(
    ("text", "user"),
    [
        ('{"user": "ann"}', "ann"),
        ('{ "user"\n:\t"ann" }', "ann"),
        ('\ufeff{"user": "ann"}', "ann"),
        ('{"user": "ann", "user": "bob"}', "bob"),
        ('{"user": "ann", "user": 7}', ""),
        ('{"user": "\\u0061nn"}', "ann"),
        ('{"\\u0075ser": "ann"}', ""),
        ('{"user": "\\ud800"}', "\udced\udca0\udc80"),
        ('{"user": "\\n\\"ann\\" \\\\"}', '\n"ann" \\'),
        ('{"user": "\\x"}', ""),
        ('{"user": 42}', ""),
        ('{"user": null}', ""),
        ('{"user": ""}', ""),
        ('{"user": {"user": "ann"}}', ""),
        ('{"user": ["ann"]}', ""),
        ('{"metadata": {"user": "eve"}}', ""),
        ('{"tools": [{"user": "eve"}], "user": "ann", "last": {"user": "eve"}}', "ann"),
        ('[{"user": "ann"}]', ""),
        ('"user": "ann"', ""),
        ('{"user": "ann"', ""),
        ("user=ann", ""),
        ("", ""),
    ],
)
def test_what_counts_as_a_user(text: str, user: str) -> None:
    assert user_of(text.encode()) == user


def test_a_user_longer_than_any_name_counts_as_absent() -> None:
    assert user_of(json.dumps({"user": "a" * MAX_USER_BYTES}).encode()) == "a" * MAX_USER_BYTES
    for length in (MAX_USER_BYTES + 1, 1_000_000):
        assert user_of(json.dumps({"user": "a" * length}).encode()) == ""
    assert user_of(json.dumps({"user": "é" * MAX_USER_BYTES}).encode()) == ""


def test_bytes_that_are_not_utf8_count_as_absent() -> None:
    assert user_of(b'{"user": "\xff"}') == ""


def test_few_nested_keys_are_looked_at_and_one_behind_more_counts_as_absent() -> None:
    """What bounds the cost of a body that is nothing but keys."""
    nested = [{"user": "eve"}] * user_field.MAX_KEYS
    assert user_of(json.dumps({"user": "ann", "tools": nested[1:]}).encode()) == "ann"
    assert user_of(json.dumps({"user": "ann", "tools": nested}).encode()) == ""
