"""A suite that cannot be judged is refused in one line before any engine starts."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mansard.errors import BadInput
from mansard.evaluation.control_tokens import check_control_tokens, known_tokens
from mansard.evaluation.suites import parse_items, read_items, suite_files, take_suite
from mansard.specs.judging import Suite
from mansard.store.store import Store

BITS = Suite(format=1, name="code-bits", kind="bits_per_byte", items="items.jsonl")
CHOICE = Suite(format=1, name="next-line", kind="multiple_choice", items="items.jsonl")
GOOD_BITS = {"id": "a", "file": "f.py", "text": "x = 1\n"}
GOOD_CHOICE = {"id": "a", "file": "f.py", "context": "x\n", "choices": ["y\n", "z\n"], "answer": 1}


def write(folder: Path, *items: Any) -> Path:
    (folder / "items.jsonl").write_text("".join(json.dumps(i) + "\n" for i in items), encoding="utf-8")
    return folder


def refusal(suite: Suite, folder: Path) -> str:
    with pytest.raises(BadInput) as refused:
        suite_files(suite, folder)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    assert "cannot read the items: No such file" in refusal(BITS, tmp_path)


@pytest.mark.parametrize("text", ["", "\n\n  \n"])
def test_suite_without_items_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "items.jsonl").write_text(text)
    assert "no items" in refusal(BITS, tmp_path)


def test_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_bytes(b'{"id": "\xff"}\n')
    assert "not UTF-8 at byte 8" in refusal(BITS, tmp_path)


def test_doubled_id_is_refused(tmp_path: Path) -> None:
    assert "items.jsonl:2: id 'a' is also on line 1" in refusal(BITS, write(tmp_path, GOOD_BITS, GOOD_BITS))


def test_the_same_item_under_two_ids_is_refused(tmp_path: Path) -> None:
    again = {**GOOD_BITS, "id": "b", "file": "g.py"}
    assert "items.jsonl:2: the same item as on line 1" in refusal(BITS, write(tmp_path, GOOD_BITS, again))
    other = {**GOOD_CHOICE, "id": "b"}
    assert "items.jsonl:2: the same item as on line 1" in refusal(CHOICE, write(tmp_path, GOOD_CHOICE, other))
    turned = {**other, "choices": ["z\n", "y\n"], "answer": 0}
    assert len(read_items(CHOICE, write(tmp_path, GOOD_CHOICE, turned) / "items.jsonl")) == 2


@pytest.mark.parametrize(
    ("text", "token"),
    [
        ("<|im_start|>user\nhello", "<|im_start|>"),
        ("a<start_of_turn>b", "<start_of_turn>"),
        ("[INST] hello [/INST]", "[INST]"),
        ("<s>hello", "<s>"),
        ("hello</s>\n", "</s>"),
        ("<\uff5cUser\uff5c>hello", "<\uff5cUser\uff5c>"),
    ],
)
def test_another_tokenizers_control_tokens_are_refused_and_the_models_own_are_not(text: str, token: str) -> None:
    items = [{**GOOD_BITS, "text": text}]
    with pytest.raises(BadInput, match=r"suite code-bits: item 'a' holds .*a control token") as refused:
        check_control_tokens("code-bits", items, ())
    assert repr(token) in str(refused.value) and "\n" not in str(refused.value)
    own = known_tokens(json.dumps({"added_tokens": [{"content": t, "id": 0} for t in (token, "[/INST]")]}).encode())
    check_control_tokens("code-bits", items, own)
    with pytest.raises(BadInput, match="control token"):
        check_control_tokens("next-line", [{**GOOD_CHOICE, "choices": ["y", text]}], ())


@pytest.mark.parametrize("text", ["if a <s> b", "x < |a| > y", "<|>", "see [1] and [INSTALL]", "<b>bold</b>", "a</s>b"])
def test_plain_text_that_looks_alike_is_taken(text: str) -> None:
    check_control_tokens("code-bits", [{**GOOD_BITS, "text": text}], ())


@pytest.mark.parametrize("key", ["id", "file", "text"])
def test_missing_key_is_named(tmp_path: Path, key: str) -> None:
    item = {k: v for k, v in GOOD_BITS.items() if k != key}
    assert f"key {key!r} is missing" in refusal(BITS, write(tmp_path, item))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answer": 2}, "answer 2 is not one of 2"),
        ({"answer": -1}, "answer -1 is not"),
        ({"answer": True}, "of type int it must be"),
        ({"answer": "1"}, "of type int it must be"),
        ({"choices": ["y"]}, "two or more"),
        ({"choices": ["y", ""]}, "none empty"),
        ({"choices": ["y", 3]}, "two or more texts"),
        ({"choices": ["y", "y"]}, "a text twice"),
        ({"context": None}, "of type str it must be"),
        ({"file": ""}, "must not be empty"),
    ],
)
def test_bad_question_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    assert words in refusal(CHOICE, write(tmp_path, {**GOOD_CHOICE, **change}))


def test_empty_text_is_refused(tmp_path: Path) -> None:
    assert "must not be empty" in refusal(BITS, write(tmp_path, {**GOOD_BITS, "text": ""}))


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text('{"id": "a", "file": "f", "text": "\\ud800"}\n')
    assert "surrogate" in refusal(BITS, tmp_path)


@pytest.mark.parametrize("line", ["{", "[1]", "3"])
def test_line_that_is_no_object_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "items.jsonl").write_text(line + "\n")
    assert "items.jsonl:1: " in refusal(BITS, tmp_path)


def test_line_separators_inside_texts_do_not_split_items(tmp_path: Path) -> None:
    item = {**GOOD_BITS, "text": "a\u2028b\x0cc\x85d"}
    (tmp_path / "items.jsonl").write_text(json.dumps(item, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_items(BITS, tmp_path / "items.jsonl") == [item]


def test_same_items_are_one_snapshot_however_they_are_written(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    first = take_suite(store, BITS, write(tmp_path, GOOD_BITS))
    (tmp_path / "items.jsonl").write_text('\n{"text": "x = 1\\n",   "note": "?", "file": "f.py", "id": "a"}')
    assert take_suite(store, BITS, tmp_path) == first
    assert parse_items(store.read_file(first, "items.jsonl")) == [GOOD_BITS]


def test_task_of_the_harness_has_no_items_of_ours() -> None:
    suite = Suite(format=1, name="arc", kind="harness", task="arc_easy", limit=50)
    files = suite_files(suite, Path("nowhere"))
    assert files["items.jsonl"] == b"" and json.loads(files["suite.json"])["task"] == "arc_easy"


@given(st.integers(1, 60), st.integers(1, 80))
def test_limit_takes_items_evenly_over_the_file(count: int, limit: int) -> None:
    from mansard.evaluation.suites import _limited

    taken = [i["id"] for i in _limited([{"id": i} for i in range(count)], limit)]
    assert len(taken) == min(count, limit) and taken == sorted(set(taken)) and taken[0] == 0
    steps = {b - a for a, b in pairwise(taken)}
    assert not steps or max(steps) - min(steps) <= 1
