"""A small site with real keys, a real store, registrations to play with, and a PostgreSQL server of our own."""

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest

from mansard.records import Registration
from mansard.release.approval import approve, sign_registration
from mansard.release.journal import Journal
from mansard.release.keys import generate_key
from mansard.serving import split as splits
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


class Postgres:
    """A private server: data and socket in a folder of its own, run by a user without rights, no TCP port."""

    def __init__(self, binaries: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mansard-pg-"))
        self._binaries = binaries
        self._process: subprocess.Popen[bytes] | None = None
        self._as: dict[str, object] = {}
        if os.geteuid() == 0:  # PostgreSQL refuses root
            nobody = pwd.getpwnam("nobody")
            os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
            self._as = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        words = ["initdb", "-D", "data", "-U", "mansard", "-A", "trust", "-E", "UTF8", "--no-sync", "--locale=C"]
        self._call(*words)

    def _call(self, program: str, *words: str) -> None:
        command = [str(self._binaries / program), *words]
        subprocess.run(command, cwd=self.folder, check=True, capture_output=True, **self._as)  # type: ignore[call-overload]

    def start(self) -> None:
        command = [str(self._binaries / "postgres"), "-D", "data", "-k", str(self.folder), "-c", "listen_addresses="]
        command += ["-c", "fsync=off", "-c", "max_connections=60"]  # our own disk's promises are not what is tested
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **self._as  # type: ignore[call-overload]
            )
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(psycopg.OperationalError), psycopg.connect(self.url("postgres")):
                return
            assert self._process.poll() is None and time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        """At once, as a crash does."""
        if self._process is not None:
            self._process.send_signal(3)  # SIGQUIT: immediate shutdown
            self._process.wait(60)
            self._process = None

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def url(self, database: str) -> str:
        return f"postgresql://mansard@/{database}?host={self.folder}"

    def new_journal(self) -> str:
        """A URL that leads to an empty schema of its own, which is cheaper than a database."""
        name = f"journal_{uuid.uuid4().hex}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {name}".encode())
        return f"{self.url('postgres')}&options=-csearch_path%3D{name}"


def _binaries() -> Path | None:
    """Where the newest initdb of the system is; Debian keeps it off the path."""
    found = [Path(p) for p in [shutil.which("initdb")] if p] + sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One server for all tests that ask for it."""
    binaries = _binaries()
    if binaries is None:
        pytest.skip("left out: the journal on PostgreSQL; no initdb here (Debian: apt-get install postgresql)")
    server = Postgres(binaries)
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def new_place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Path | str]:
    """Where a new journal may be, again and again: first in files, then on the server."""
    if request.param == "sqlite":
        return lambda: tmp_path / uuid.uuid4().hex / "journal.sqlite3"
    server: Postgres = request.getfixturevalue("postgres")
    return server.new_journal


@pytest.fixture
def place(new_place: Callable[[], Path | str]) -> Path | str:
    """Where a new journal may be."""
    return new_place()
