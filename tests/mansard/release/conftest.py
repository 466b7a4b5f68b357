"""A small site with real keys, a real store, and registrations to play with."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mansard.records import Registration
from mansard.release.journal import Journal
from mansard.release.keys import generate_key
from mansard.site import Environment, Person, Site, load_site
from mansard.store import Store

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
