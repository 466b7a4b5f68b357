"""Who counts as an attempt, and that nobody gets a fresh one by breaking off, by renaming or by another seed."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from mansard.records import Registration
from mansard.release.events import ATTEMPTED
from mansard.release.journal import Journal
from mansard.site import Site, load_site
from mansard.specs.judging import Gate
from mansard.store.store import Store
from tasks.attempts import begin_attempt, expected_attempt

SITE = """
format: 1
home: home
data: data
models: [demo]
environments:
  main: {python: python, lock: lock.txt}
  serve: {python: python, lock: lock.txt}
stages: {default: main}
"""
GATE = Gate.model_validate({"suites": [{"suite": "a.yaml", "role": "target"}]})
ITEMS: Mapping[str, bytes] = {"code": b'{"id": 1}\n', "docs": b'{"id": 2}\n'}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    (tmp_path / "site.yaml").write_text(SITE)
    return load_site(tmp_path / "site.yaml")


@pytest.fixture
def journal(site: Site) -> Iterator[Journal]:
    with Journal.open(site.journal) as opened:
        yield opened


def suite(site: Site, name: str, items: bytes, task: str | None = None) -> tuple[str, str]:
    description = json.dumps({"name": name, "task": task}).encode()
    return name, Store(site.store).put_files({"suite.json": description, "items.jsonl": items})


def suites(site: Site) -> tuple[tuple[str, str], ...]:
    return tuple(suite(site, name, items) for name, items in ITEMS.items())


def begin(site: Site, letter: str, on: tuple[tuple[str, str], ...] | None = None, gate: Gate = GATE) -> int:
    return begin_attempt.fn(site, "demo", letter * 64, gate, on or suites(site), letter * 8, "ada")


def registered(letter: str, verdict: str = "pass") -> Registration:
    return Registration(
        model_name="demo",
        model=letter * 64,
        artifact=letter * 64,
        verdict=verdict,
        verdict_record="e" * 64,
        fingerprint="f" * 64,
        item_records=tuple((name, letter * 64) for name in ITEMS),
        base_version=None,
        baseline_version=None,
        anchor_version=None,
        author="ada",
        spec_name="demo",
        spec_digest=letter * 8,
        serve={},
        release={},
        stages=(),
    )


def release(journal: Journal, version: int) -> None:
    journal.start_rollout("demo", version, "ada", "", journal.pointers("demo"))
    journal.promote("demo", version, "ada", "", journal.pointers("demo"))


def test_a_candidate_that_was_evaluated_and_never_registered_is_an_attempt(site: Site) -> None:
    assert [begin(site, letter) for letter in "bcd"] == [1, 2, 3]


def test_the_same_candidate_keeps_its_number_and_adds_no_entry(site: Site, journal: Journal) -> None:
    assert [begin(site, letter) for letter in "bcbcd"] == [1, 2, 1, 2, 3]
    journal.register(registered("b"), None)
    assert [begin(site, letter) for letter in "bcde"] == [1, 2, 3, 4]
    assert len(journal.entries("demo", kinds=(ATTEMPTED,))) == 4
    journal.verify()


def test_a_promotion_begins_anew(site: Site, journal: Journal) -> None:
    journal.register(registered("a", "baseline"), None)
    release(journal, 1)
    assert [begin(site, letter) for letter in "bc"] == [1, 2]
    journal.register(registered("c"), None)
    release(journal, 2)
    assert [begin(site, letter) for letter in "bdb"] == [1, 2, 1]


def test_the_same_artifact_under_another_seed_or_margin_is_another_attempt(site: Site) -> None:
    assert begin(site, "b") == 1
    assert begin(site, "b", gate=GATE.model_copy(update={"seed": 1})) == 2
    assert begin(site, "b", gate=GATE.model_copy(update={"alpha": 0.1})) == 3
    assert begin(site, "b") == 1


def test_a_suite_under_another_name_is_the_same_suite_and_other_items_under_the_name_are_too(site: Site) -> None:
    assert begin(site, "b") == 1
    assert begin(site, "c", on=(suite(site, "renamed", ITEMS["code"]),)) == 2
    assert begin(site, "d", on=(suite(site, "code", b'{"id": 3}\n'),)) == 2
    assert begin(site, "e", on=(suite(site, "another", b'{"id": 4}\n'),)) == 1
    assert begin(site, "f", on=(suite(site, "quiz", b"", task="arc"),)) == 1
    assert begin(site, "g", on=(suite(site, "quiz-2", b"", task="arc"),)) == 2


def test_a_spec_is_told_before_training_what_its_candidate_will_be(site: Site) -> None:
    for letter in "bc":
        begin(site, letter)
    told = [expected_attempt(site, "demo", suites(site), letter * 8) for letter in "bcd"]
    assert told == [1, 2, 3] == [begin(site, letter) for letter in "bcd"]


def test_registrations_from_before_attempts_were_recorded_count(site: Site, journal: Journal) -> None:
    journal.register(registered("a", "baseline"), None)
    for letter in "bc":
        journal.register(registered(letter, "fail"), None)
    journal.register(replace(registered("c"), spec_digest="other"), None)
    assert [begin(site, letter) for letter in "cbd"] == [2, 1, 3]
