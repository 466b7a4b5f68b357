from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mansard.errors import BadInput, Conflict
from mansard.records import Registration
from mansard.release import keys
from mansard.release.approval import check_registration
from mansard.release.journal import Journal
from mansard.site import Site, load_site
from tasks.registration import find_recorded, register, register_judgement, standing

SITE = """
format: 1
home: home
data: data
models: [demo]
environments:
  main: {python: python, lock: lock.txt}
  serve: {python: python, lock: lock.txt}
stages: {default: main}
people:
  ada: {roles: [author], public_key: home/keys/ada.pub}
"""
SUITES = ("code-bits", "docstrings-bits")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    (tmp_path / "site.yaml").write_text(SITE)
    made = load_site(tmp_path / "site.yaml")
    keys.generate_key("ada", made)
    return made


@pytest.fixture
def journal(site: Site) -> Iterator[Journal]:
    with Journal.open(site.journal) as opened:
        yield opened


def candidate(letter: str, **fields: object) -> Registration:
    made = Registration(
        model_name="demo",
        model=letter * 64,
        artifact=letter * 64,
        verdict="pass",
        verdict_record="e" * 64,
        fingerprint="f" * 64,
        item_records=tuple((suite, letter * 64) for suite in SUITES),
        base_version=None,
        baseline_version=None,
        anchor_version=None,
        author="ada",
        spec_name="demo",
        spec_digest="0" * 64,
        serve={},
        release={},
        stages=(),
    )
    return replace(made, **fields)  # type: ignore[arg-type]


def release(journal: Journal, version: int) -> None:
    journal.start_rollout("demo", version, "ada", "", journal.pointers("demo"))
    journal.promote("demo", version, "ada", "", journal.pointers("demo"))


def test_nothing_is_judged_while_nothing_is_stable(site: Site, journal: Journal) -> None:
    journal.register(candidate("a"), None)
    with pytest.raises(Conflict, match=r"nothing of demo is stable.*mansard adopt SPEC"):
        standing(site, "demo", 1)
    release(journal, 1)
    found = standing(site, "demo", 1)
    assert (found.stable, found.stable_artifact, found.anchor) == (1, "a" * 64, 1)
    with pytest.raises(BadInput, match="no version 9"):
        standing(site, "demo", 9)


def test_registration_is_signed_by_its_author_and_a_repeat_is_the_same_version(site: Site, journal: Journal) -> None:
    made = candidate("a")
    assert register.fn(site, made) == register.fn(site, made) == 1
    check_registration(site, made, journal.signature("demo", 1))
    assert find_recorded(site, "demo", "a" * 64, "0" * 64) == (1, made)
    assert find_recorded(site, "demo", "a" * 64, "1" * 64) is None


def test_a_version_judged_again_keeps_its_number_and_is_signed_again(site: Site, journal: Journal) -> None:
    register.fn(site, candidate("a"))
    again = candidate("a", verdict="fail", verdict_record="d" * 64, baseline_version=1)
    register_judgement.fn(site, 1, again, "the baseline moved")
    register_judgement.fn(site, 1, again, "the baseline moved")
    assert journal.versions("demo") == [1]
    assert [e.kind for e in journal.entries("demo")] == ["registered", "judged"]
    check_registration(site, again, journal.signature("demo", 1))
