"""Shared 13-grams against a plain search, and the stage that lists them."""

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mansard.errors import BadInput
from mansard.evaluation.contamination import NGRAM_WORDS, Index, check_shared, text_of, words_of
from mansard.evaluation.contamination_stage import run
from mansard.store.store import Store
from tests.mansard.evaluation.stage_context import stage_context


def item(number: int, text: str) -> dict[str, Any]:
    return {"id": f"i{number}", "file": f"f{number}", "text": text}


def lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def grams(text: str) -> set[tuple[str, ...]]:
    words = words_of(text)
    return {tuple(words[i : i + NGRAM_WORDS]) for i in range(len(words) - NGRAM_WORDS + 1)}


texts = st.lists(st.lists(st.sampled_from("ab"), min_size=0, max_size=40).map(" ".join), min_size=1, max_size=5)


@settings(max_examples=100, deadline=None)
@given(texts, texts)
def test_what_is_found_is_what_a_plain_search_finds(items: list[str], training: list[str]) -> None:
    index = Index({"s": [item(n, t) for n, t in enumerate(items)]})
    found = index.found({"code": index.seen_in(iter(training))})["s"]
    known = set().union(*(grams(t) for t in training))
    assert {s.item for s in found.shared} == {f"i{n}" for n, t in enumerate(items) if grams(t) & known}
    assert found.num_items == len(items)


def test_case_and_marks_hide_nothing_and_texts_do_not_run_together() -> None:
    words = [f"word{i}" for i in range(20)]
    index = Index({"s": [item(0, " ".join(words))]})
    assert index.seen_in(iter([", ".join(words).upper()]))
    assert not index.seen_in(iter([" ".join(words[:12]), " ".join(words[12:])]))
    assert not index.seen_in(iter([" ".join([*words[:12], "other", *words[12:]])]))
    assert not index.seen_in(iter(["", "short"]))


def test_a_question_is_looked_for_with_its_right_answer() -> None:
    assert text_of({"context": "a b", "choices": ["x", "y"], "answer": 1}) == "a b y"


def test_stage_counts_and_lists_by_suite_with_the_source(store: Store) -> None:
    random.seed(0)
    texts = [" ".join(random.choice("abcdefghijklmnop") for _ in range(60)) for _ in range(5)]
    suite = store.put_files({"items.jsonl": lines([item(n, t) for n, t in enumerate(texts)])})

    def training(*some: str) -> str:
        return store.put_files({"data.jsonl": lines([{"text": t, "file": "x"} for t in some])})

    inputs = {"suite.bits": suite, "data.code.train": training("clean"), "data.docs.train": training(texts[3][:80])}
    found = json.loads(store.read_file(run(stage_context(store, inputs)), "contamination.json"))["suites"]["bits"]
    assert (found["num_items"], found["num_shared"], found["shared_fraction"]) == (5, 1, 0.2)
    check_shared({"suites": {"bits": found}}, 0.2)
    with pytest.raises(BadInput, match=r"suite bits: 1 of 5 items share 13 words in a row .*i3.*max_shared_fraction"):
        check_shared({"suites": {"bits": found}}, 0.1)
    listed = found["listed"][0]
    assert (listed["item"], listed["sources"]) == ("i3", ["docs"])
    assert listed["fraction"] == pytest.approx(28 / 48, abs=0.001) and listed["passage"] == texts[3][:25]


def test_a_suite_without_items_of_ours_is_said_to_hold_none(store: Store) -> None:
    text = store.put_files({"data.jsonl": b""})
    inputs = {"suite.task": store.put_files({"items.jsonl": b""}), "data.code.train": text}
    found = json.loads(store.read_file(run(stage_context(store, inputs)), "contamination.json"))
    assert found["suites"]["task"]["num_items"] == 0


def test_items_too_short_for_a_13_gram_are_counted_as_such() -> None:
    index = Index({"s": [item(0, "one two three"), item(1, " ".join(str(n) for n in range(13)))]})
    assert index.found({})["s"].num_short == 1
