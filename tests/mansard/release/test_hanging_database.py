"""The journal's database accepts and never answers: a stopped server, and a network that swallows what is sent."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from mansard.errors import JournalDown
from mansard.records import Registration
from mansard.release.journal import Journal
from mansard.release.memory import remember
from mansard.serving.split import read_split
from mansard.site import Site, load_site
from tests.mansard.swallowing_proxy import SwallowingProxy, swallowing_proxy

ROOT = Path(__file__).resolve().parents[3]
LIMIT_SECONDS = 0.5
DEADLINE_SECONDS = 60.0
"""Of a command on a busy machine; without a limit each waited for ever."""

VERBS = (
    (("status",), 0, "stable    2"),
    (("history",), 1, "rolled back from version 3 to 2"),
    (("verify", "--journal"), 1, ""),
    (("why", "3"), 1, ""),
)
"""With their exit code and what they print."""

Make = Callable[..., Registration]


@pytest.fixture
def proxy(postgres: Any) -> Iterator[SwallowingProxy]:
    with swallowing_proxy(postgres.socket) as proxy:
        yield proxy


@contextmanager
def hanging(postgres: Any, proxy: SwallowingProxy | None) -> Iterator[None]:
    """The server is stopped, or the proxy before it swallows; afterwards it answers again."""
    if proxy is not None:
        proxy.swallow()
    else:
        postgres.freeze()
    try:
        yield
    finally:
        postgres.thaw()
        if proxy is not None:
            proxy.pass_on()


@pytest.mark.parametrize("is_swallowed", [False, True])
def test_every_question_ends_by_its_limit_and_the_open_journal_goes_on_afterwards(
    postgres: Any, proxy: SwallowingProxy, candidate: Make, is_swallowed: bool
) -> None:
    url = proxy.url_of(postgres.new_journal(), postgres.folder)
    with Journal.open(url, limit_seconds=LIMIT_SECONDS) as journal:
        journal.register(candidate("one"), None)
        with hanging(postgres, proxy if is_swallowed else None):
            for ask in (journal.tip, lambda: journal.register(candidate("two"), None)):
                with pytest.raises(JournalDown, match=r"no answer in 0\.5 s; does the server run") as caught:
                    ask()
                assert "\n" not in str(caught.value)
            with pytest.raises(JournalDown, match=r"no answer in 0\.5 s"):
                Journal.open(url, limit_seconds=LIMIT_SECONDS)
        deadline = time.monotonic() + DEADLINE_SECONDS
        while True:
            try:
                assert journal.register(candidate("two"), None) == 2
                break
            except JournalDown:
                assert time.monotonic() < deadline
        journal.verify()


def test_a_silent_server_is_not_asked_again_at_once(postgres: Any, proxy: SwallowingProxy) -> None:
    url = proxy.url_of(postgres.new_journal(), postgres.folder)
    with Journal.open(url, limit_seconds=LIMIT_SECONDS) as journal, hanging(postgres, proxy):
        messages = set()
        begin = time.monotonic()
        for _ in range(50):
            with pytest.raises(JournalDown) as caught:
                journal.tip()
            messages.add(str(caught.value))
        assert len(messages) == 1
        assert time.monotonic() - begin < 50 * LIMIT_SECONDS / 2, "each waited"


def test_a_transaction_that_the_network_swallows_gives_its_lock_back(
    postgres: Any, proxy: SwallowingProxy, candidate: Make
) -> None:
    direct = postgres.new_journal()
    with Journal.open(direct) as journal:
        journal.register(candidate("one"), None)
    far = proxy.url_of(direct, postgres.folder)
    with Journal.open(far, guard=lambda *_: proxy.swallow(), limit_seconds=LIMIT_SECONDS) as swallowed:
        with pytest.raises(JournalDown):
            swallowed.start_rollout("demo", 1, "ada", "", swallowed.pointers("demo"))
        with Journal.open(direct) as journal:  # the server still holds the lock of the client that it cannot hear
            assert journal.register(candidate("two"), None) == 2
            assert journal.pointers("demo").canary is None
            journal.verify()


class Night:
    """Three versions were released, in a journal on a server that then hangs."""

    def __init__(self, site: Site, url: str) -> None:
        text = site.path.read_text().replace("models: [demo, other]", f"models: [demo]\njournal: {url!r}")
        site.path.write_text(text)
        self.site = load_site(site.path)

    def run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "flows.cli", *words, "--site", str(self.site.path)],
            cwd=self.site.home, env={**os.environ, "MANSARD_PERSON": "otto", "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=DEADLINE_SECONDS,
        )  # fmt: skip


@pytest.fixture
def night(three: Site, postgres: Any, proxy: SwallowingProxy) -> Night:
    url = postgres.new_journal()
    with Journal.open(three.journal) as source, psycopg.connect(url) as target:
        Journal.open(url).close()
        for table in ("journal", "versions", "pointers"):
            for row in source._ledger.rows(f"SELECT * FROM {table}"):
                target.execute(f"INSERT INTO {table} VALUES ({', '.join(['%s'] * len(row))})", row)
        target.execute("UPDATE term SET number = %s", (source.term(),))
    night = Night(three, proxy.url_of(url, postgres.folder))
    with Journal.open(night.site.journal) as journal:
        journal.verify()
        remember(night.site, journal)
    return night


@pytest.mark.parametrize("is_swallowed", [False, True])
def test_a_rollback_without_the_host_moves_users_and_the_journal_follows(
    night: Night, postgres: Any, proxy: SwallowingProxy, is_swallowed: bool
) -> None:
    with hanging(postgres, proxy if is_swallowed else None):
        ran = night.run("rollback", "--hard", "--json")
        assert ran.returncode == 0, ran.stderr
        answer = json.loads(ran.stdout)
        assert (answer["changed"], answer["stable"]) == (True, 2)
        assert "no answer in 0.6 s" in answer["journal"]
        assert read_split(night.site.split_file).models["demo"].stable == 2
        again = json.loads(night.run("rollback", "--json").stdout)
        assert (again["changed"], again["stable"]) == (False, 2)
        with ThreadPoolExecutor(len(VERBS)) as threads:
            results = threads.map(lambda verb: night.run(*verb[0]), VERBS)
            for (words, code, text), ran in zip(VERBS, results, strict=True):
                assert (ran.returncode, text in ran.stdout) == (code, True), (words, ran.stdout, ran.stderr)
                assert ran.stderr.count("\n") == code, (words, ran.stderr)
                assert "Traceback" not in ran.stderr
    ran = night.run("rollback", "--json")
    assert ran.returncode == 0, ran.stderr
    assert not night.site.emergency_file.exists()
    with Journal.open(night.site.journal) as journal:
        journal.verify()
        assert journal.pointers("demo").stable == 2
