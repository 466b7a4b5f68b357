"""infra/ONCALL.md is true: each of its commands is executed as a process, in the situation of its section, with
Prefect, MLflow and the host down, and says what the page says."""

import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from mansard.records import Registration
from mansard.release.events import uptime_now
from mansard.release.journal import Journal
from mansard.release.memory import remember
from mansard.serving import split as splits
from mansard.site import Site, load_site
from tests.mansard.hanging_server import hanging_server
from tests.mansard.s3_server import environment

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "infra/ONCALL.md").read_text()
ELSEWHERE = {"mansard up": "tests/flows/test_servers.py"}
EXITS = {"has no engine that answers": 1, "nothing to go back to": 7, "was changed": 6}


@dataclass(frozen=True)
class Step:
    """One command of the page and what it says."""

    section: str
    command: str
    says: tuple[str, ...]


def steps() -> list[Step]:
    found = []
    for section in PAGE.split("\n## ")[1:]:
        title = section.splitlines()[0]
        for command, text in re.findall(r"```\n(mansard .*?)\n```\n\n(.*?)(?=\n```|\Z)", section, flags=re.DOTALL):
            sentence = re.match(r"It says (.*?)\.(?:\s|$)", text, flags=re.DOTALL)
            says = re.findall(r"`(.*?)`", sentence[1]) if sentence else []
            found.append(Step(title, command, tuple(says)))
    return found


SECTIONS = list(dict.fromkeys(step.section for step in steps()))


@pytest.fixture
def healthy() -> Iterator[str]:
    """An engine's health, for all versions."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


class Night:
    """The site, and what befalls it."""

    def __init__(self, site: Site, endpoint: str, candidate: Callable[..., Registration], hanging_url: str) -> None:
        self.site = site
        self.variables = {**os.environ, "MANSARD_SITE": str(site.path), "MANSARD_PERSON": "otto"}
        self._hanging_url = hanging_url
        self._candidate = candidate
        self._place(endpoint)
        self.remember()

    def _place(self, endpoint: str | None) -> None:
        split = splits.Split()
        with Journal.open(self.site.journal) as journal:
            term = journal.term()
        for version in (1, 2, 3):
            split = splits.with_stable(split, "demo", version, endpoint, "demo", term)
        self.site.split_file.unlink()
        splits.write_split(self.site.split_file, split)

    def remember(self) -> None:
        with Journal.open(self.site.journal) as journal:
            remember(self.site, journal)

    def run(self, command: str) -> tuple[int, str]:
        words = [w.strip('"') for w in re.findall(r'"[^"]*"|\S+', command)]
        assert words[0] == "mansard"
        command = [sys.executable, "-m", "flows.cli", *words[1:]]
        done = subprocess.run(command, cwd=ROOT, env=self.variables, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    # What befalls it

    def canary(self) -> None:
        with Journal.open(self.site.journal) as journal:
            journal.register(self._candidate("four"), None)
            journal.start_rollout("demo", 4, "otto", "", journal.pointers("demo"))
            term = journal.step("demo", 4, 25, "host", "", journal.pointers("demo"))
        split = splits.read_split(self.site.split_file)
        split = splits.with_canary(split, "demo", 4, "http://127.0.0.1:9", "demo", 25, term)
        splits.write_split(self.site.split_file, split)
        self.remember()

    def rolled_back(self) -> None:
        assert self.run('mansard rollback --why "slow since the release"')[0] == 0

    def dead_engines(self) -> None:
        self._place("http://127.0.0.1:9")

    def outage(self, to: int | None = 2) -> None:
        with Journal.open(self.site.journal) as journal:
            journal.stable_down("demo", to, "host", "its engine ended", journal.pointers("demo"), uptime_now())
        if to is not None:
            split = splits.read_split(self.site.split_file)
            endpoint = split.models["demo"].versions[to].endpoint
            splits.write_split(self.site.split_file, splits.with_stand_in(split, "demo", to, endpoint, "demo"))

    def database_down(self) -> None:
        aside = self.site.home / "aside"
        aside.mkdir()
        for path in self.site.home.glob("journal.sqlite3*"):
            path.rename(aside / path.name)
        (self.site.home / "journal.sqlite3").mkdir()

    def database_up(self) -> None:
        (self.site.home / "journal.sqlite3").rmdir()
        for path in (self.site.home / "aside").iterdir():
            path.rename(self.site.home / path.name)

    def bucket_hangs(self) -> None:
        self.variables |= environment(self._hanging_url)
        self.site.path.write_text(self.site.path.read_text() + "store: s3://models/mansard\n")
        shutil.rmtree(self.site.store)  # a folder holds one store, and this one's content is in the bucket

    def back_from_an_outage(self) -> None:
        self.database_down()
        self.rolled_back()
        self.database_up()

    def conflict(self) -> None:
        self.canary()
        with Journal.open(self.site.journal) as journal:
            journal.promote("demo", 4, "host", "", journal.pointers("demo"))
        self.back_from_an_outage()
        assert self.run("mansard rollback --from 4")[0] == 0

    def tampered(self) -> None:
        code, said = self.run("mansard verify --journal")
        assert code == 0 and "the chain is whole" in said
        with closing(sqlite3.connect(self.site.home / "journal.sqlite3")) as raw:
            for (name,) in raw.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
                raw.execute(f"DROP TRIGGER {name}")
            raw.execute("UPDATE journal SET who = 'mallory' WHERE sequence = 3")
            raw.commit()

    def only_one(self) -> None:
        for path in self.site.home.glob("journal.sqlite3*"):
            path.unlink()
        with Journal.open(self.site.journal) as journal:
            journal.register(self._candidate("one"), None)
            journal.start_rollout("demo", 1, "otto", "", journal.pointers("demo"))
            journal.promote("demo", 1, "host", "", journal.pointers("demo"))


BEFALLS: dict[str, Callable[[Night], None]] = {
    "What is going on?": lambda night: None,
    "A canary runs and users complain": Night.canary,
    "The new stable version is bad": lambda night: None,
    "Stable's engine is dead": Night.outage,
    "Stable's engine is dead and nobody stands in": lambda night: night.outage(None),
    "Perhaps a colleague is at it too": Night.rolled_back,
    "The version before is bad as well": lambda night: None,
    "The version before has no engine, and nobody can start one": Night.dead_engines,
    "The journal's database is down": Night.database_down,
    "The bucket does not answer": Night.bucket_hangs,
    "The database is back": Night.back_from_an_outage,
    "Did an emergency meet a journal that had moved unseen?": Night.conflict,
    "Who did what last night, and why?": Night.rolled_back,
    "Where does a version come from?": lambda night: None,
    "Has anybody changed the journal?": Night.tampered,
    "There is nothing to go back to": Night.only_one,
}


@pytest.fixture
def night(three: Site, healthy: str, candidate: Callable[..., Registration]) -> Iterator[Night]:
    text = three.path.read_text().replace("models: [demo, other]", "models: [demo]")
    three.path.write_text(text + "ports: {prefect: 9, mlflow: 9}\n")
    with hanging_server() as url:
        yield Night(replace(load_site(three.path)), healthy, candidate, url)


def test_the_page_holds_every_situation_that_is_tested_and_no_other() -> None:
    assert set(BEFALLS) == set(SECTIONS) - {"The host is down"}
    commands = PAGE.count("\nmansard ")
    assert len(steps()) == commands >= 17


@pytest.mark.parametrize("section", [s for s in SECTIONS if s != "The host is down"])
def test_the_page_says_what_happens(night: Night, section: str) -> None:
    BEFALLS[section](night)
    for step in steps():
        if step.section == section:
            code, said = night.run(step.command)
            assert step.says, f"{step.command}: the page says nothing"
            for words in step.says:
                assert words in said, f"{step.command}: {words!r} is not in:\n{said}"
            assert code == next((EXITS[w] for w in step.says if w in EXITS), 0), said


def test_the_rest_of_the_page_is_executed_where_it_says() -> None:
    for step in steps():
        if step.section not in BEFALLS:
            verb = step.command.removeprefix("mansard ")
            assert f'mansard("{verb}",' in (ROOT / ELSEWHERE[step.command]).read_text()
