"""A small site with real keys, a real store, and registrations to play with."""

import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from mansard.records import Registration
from mansard.release.approval import approve, sign_registration
from mansard.release.journal import Journal
from mansard.release.keys import generate_key
from mansard.serving import split as splits
from mansard.site import Site, load_site
from mansard.site_sections import Environment, Person
from mansard.store.store import Store
from tests.mansard.postgres_server import PostgresServer

ROLES = {"ada": "author, operator", "grace": "reviewer, operator", "both": "author, reviewer", "otto": "operator"}

SITE = """format: 1
home: .
data: data
models: [demo, other]
environments:
  main: {{python: python, lock: lock.txt}}
  serve: {{python: python, lock: lock.txt}}
stages: {{default: main}}
people:
{people}
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """ada authors, grace reviews, both does both, otto operates; each has a key."""
    monkeypatch.delenv("MANSARD_KEYS", raising=False)
    bare = Site(tmp_path / "site.yaml", tmp_path, tmp_path, ("demo",), {"main": Environment(tmp_path, tmp_path)}, {})
    for name in ROLES:
        generate_key(name, bare)
    people = "\n".join(f"  {n}: {{roles: [{r}], public_key: keys/{n}.pub}}" for n, r in ROLES.items())
    (tmp_path / "site.yaml").write_text(SITE.format(people=people))
    return load_site(tmp_path / "site.yaml")


@pytest.fixture
def with_people(site: Site) -> Callable[..., Site]:
    """The same site with people changed: name -> Person, or None to take one out."""

    def changed(**people: Person | None) -> Site:
        merged = {**site.people, **people}
        return replace(site, people={n: p for n, p in merged.items() if p is not None})

    return changed


@pytest.fixture
def store(site: Site) -> Store:
    return Store(site.store)


@pytest.fixture
def journal(site: Site) -> Iterator[Journal]:
    with Journal.open(site.journal) as opened:
        yield opened


@pytest.fixture
def candidate(store: Store) -> Callable[..., Registration]:
    """A registration with snapshots of its own in the store; keyword arguments replace fields."""

    def make(name: str = "one", **fields: object) -> Registration:
        artifact = store.put_files({"model.bin": f"weights {name}".encode()})
        record = store.put_files({"verdict.json": b'{"format":1}', "report.md": f"report {name}".encode()})
        made = Registration(
            model_name="demo",
            model=store.put_files({"plain.bin": name.encode()}),
            artifact=artifact,
            verdict="pass",
            verdict_record=record,
            fingerprint=store.put_files({"fingerprint.json": b"{}"}),
            item_records=(("code-bits", record),),
            base_version=1,
            baseline_version=1,
            anchor_version=1,
            author="ada",
            spec_name="demo",
            spec_digest="5" * 64,
            serve={"dtype": "bfloat16"},
            release={"steps": [{"weight_percent": 25, "bake_seconds": 0.5, "min_requests": 1}]},
            stages=(("quantize", "7" * 64, artifact),),
        )
        return replace(made, **fields)  # type: ignore[arg-type]

    return make


@pytest.fixture
def three(site: Site, candidate: Callable[..., Registration]) -> Site:
    """Versions 1, 2 and 3 were released an hour ago, one after the other; all are resident."""
    split, an_hour_ago = splits.Split(), datetime.now(UTC) - timedelta(hours=1)
    with Journal.open(site.journal, clock=lambda: an_hour_ago) as journal:
        for version, name in enumerate(("one", "two", "three"), 1):
            made = candidate(name, base_version=version - 1 or None, baseline_version=version - 1 or None)
            made = replace(made, verdict="baseline") if version == 1 else made
            journal.register(made, sign_registration(site, made))
            approve(site, journal, Store(site.store), "demo", version, "grace", "good")
            journal.start_rollout("demo", version, "otto", "", journal.pointers("demo"))
            journal.step("demo", version, 25, "host", "", journal.pointers("demo"))
            journal.promote("demo", version, "host", "all steps pass", journal.pointers("demo"))
            split = splits.with_stable(split, "demo", version, f"http://127.0.0.1:810{version}", "demo", journal.term())
    splits.write_split(site.split_file, split)
    return site


@pytest.fixture(params=["sqlite", "postgresql"])
def new_place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Path | str]:
    """Where a new journal may be, again and again: first in files, then on the server."""
    if request.param == "sqlite":
        return lambda: tmp_path / uuid.uuid4().hex / "journal.sqlite3"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.new_journal


@pytest.fixture
def place(new_place: Callable[[], Path | str]) -> Path | str:
    """Where a new journal may be."""
    return new_place()
