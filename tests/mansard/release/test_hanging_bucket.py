"""The store's bucket accepts and never answers: what each command does then, as processes with the host down."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mansard.records import Registration
from mansard.release.journal import Journal
from mansard.release.memory import remember
from mansard.serving.split import read_split
from mansard.site import Site, load_site
from tests.mansard.hanging_server import hanging_server
from tests.mansard.s3_server import environment

ROOT = Path(__file__).resolve().parents[3]
URL = "s3://models/mansard"
DEADLINE_SECONDS = 60.0
"""Of a command on a busy machine; without a limit on a request each took minutes, or never ended."""
STORE_VERBS = (
    *(("snapshot", "."), ("restore", "3f2a", "new"), ("verify",), ("collect",), ("collect", "--dry-run"), ("pin",)),
    *(("gate", "3"), ("review", "3")),
)


class Night:
    """Three versions were released; then the site's store is a bucket that hangs."""

    def __init__(self, site: Site, url: str) -> None:
        text = site.path.read_text().replace("models: [demo, other]", "models: [demo]")
        site.path.write_text(f"{text}store: {URL}\n")
        shutil.rmtree(site.store)  # a folder holds one store, and this one's content is in the bucket
        self.site = load_site(site.path)
        self._variables = {**os.environ, **environment(url), "MANSARD_PERSON": "otto", "PYTHONPATH": str(ROOT)}

    def run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "flows.cli", *words, "--site", str(self.site.path)],
            cwd=self.site.home, env=self._variables, capture_output=True, text=True, timeout=DEADLINE_SECONDS,
        )  # fmt: skip


@pytest.fixture
def night(three: Site) -> Iterator[Night]:
    with Journal.open(three.journal) as journal:
        remember(three, journal)
    with hanging_server() as url:
        yield Night(three, url)


@pytest.mark.parametrize("is_journal_there", [True, False])
def test_a_rollback_moves_and_warns_that_the_bucket_did_not_answer(night: Night, is_journal_there: bool) -> None:
    if not is_journal_there:
        for path in night.site.home.glob("journal.sqlite3*"):
            path.rename(night.site.home / f"aside-{path.name}")
        (night.site.home / "journal.sqlite3").mkdir()
    ran = night.run("rollback", "--hard", "--json")
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert (told["changed"], told["stable"]) == (True, 2)
    assert f"version 2: {URL}: no answer in 2 s, so its artifact was not checked" in told["warnings"]
    assert read_split(night.site.split_file).models["demo"].stable == 2


def test_what_needs_no_store_says_all_it_has(night: Night) -> None:
    for words, says in (
        (("status",), "stable    3"),
        (("history",), "promoted version 3"),
        (("verify", "--journal"), "the chain is whole"),
        (("why", "3"), "problem: verdict record"),
    ):
        ran = night.run(*words)
        assert (ran.returncode, says in ran.stdout) == (0, True), (words, ran.stdout, ran.stderr)
    assert f"{URL}: no answer to a read of" in ran.stdout


def test_what_needs_the_store_ends_with_one_line(night: Night) -> None:
    with ThreadPoolExecutor(len(STORE_VERBS)) as threads:
        for words, ran in zip(STORE_VERBS, threads.map(lambda words: night.run(*words), STORE_VERBS), strict=True):
            assert ran.returncode == 1, (words, ran.stdout, ran.stderr)
            assert ran.stderr.startswith(f"mansard {words[0]}: {URL}: no answer to a "), (words, ran.stderr)
            assert ran.stderr.count("\n") == 1, (words, ran.stderr)
    assert night.site.home.joinpath("new").exists() is False


def test_an_approval_is_not_signed_without_a_look_at_the_evidence(
    night: Night, candidate: Callable[..., Registration]
) -> None:
    ran = night.run("approve", "3", "--as", "grace", "--reason", "good")
    assert ran.returncode != 0
    assert ran.stderr.count("\n") == 1
