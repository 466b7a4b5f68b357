"""What follows the journal beside the host."""

import logging
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mansard.errors import Corrupt
from mansard.release.ballast import BALLAST_BYTES
from mansard.release.direct_rollback import Request, rollback_directly
from mansard.release.journal import Journal
from mansard.release.memory import recall
from mansard.release.tip import read_tip
from mansard.serving.host.journal_watch import JournalWatch
from mansard.serving.host.when_down import follow_pointers
from mansard.site import load_site


def wait_for(found: Callable[[], Any]) -> Any:
    pause = threading.Event()
    for _ in range(6000):
        if value := found():
            return value
        pause.wait(0.02)
    raise AssertionError("waited two minutes")


@pytest.fixture
def journal(place: Any) -> Any:
    with Journal.open(place.site.journal) as opened:
        place.host = object()  # there is none to end
        place.close = lambda: None
        yield opened


def test_the_tip_follows_the_journal(place: Any, journal: Journal) -> None:
    with JournalWatch(place.site):
        for number in range(2, 5):
            journal.append("demo", "remark", "ada", "", {"number": number})
            newest = journal.tip()
            assert newest is not None
            tip = wait_for(lambda n=newest: (t := read_tip(place.site.tip_file)) and t.sequence >= n.sequence and t)
            assert tip.digest == journal.entry(tip.sequence).digest  # type: ignore[union-attr]


def test_no_tip_is_signed_for_a_journal_that_lost_its_end(place: Any, journal: Journal) -> None:
    watch = JournalWatch(place.site)
    for number in range(3):
        journal.append("demo", "remark", "ada", "", {"number": number})
    watch.look(journal)
    before = read_tip(place.site.tip_file)
    with closing(sqlite3.connect(place.site.journal)) as raw:
        for (name,) in raw.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            raw.execute(f"DROP TRIGGER {name}")
        raw.execute("DELETE FROM journal WHERE sequence >= 3")
        raw.commit()
    for late in (watch, JournalWatch(place.site)):  # also after a restart
        with pytest.raises(Corrupt, match="no newer tip is signed"):
            late.look(journal)
    assert read_tip(place.site.tip_file) == before


def test_a_changed_people_section_is_an_entry_and_a_broken_site_file_only_a_line(
    place: Any, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    site, watch = place.site, JournalWatch(place.site)
    watch.look(journal)
    assert [e.who for e in journal.entries(kinds=("people_changed",))] == ["host"]
    text = site.path.read_text()
    site.path.write_text("people: [")
    with caplog.at_level(logging.ERROR):
        watch.look(journal)
        watch.look(journal)
    assert len([r for r in caplog.records if "not YAML" in r.message]) == 1
    site.path.write_text(text.replace('"reviewer", "operator"', '"operator"'))
    watch.look(journal)
    told = journal.entries(kinds=("people_changed",))
    assert [e.body["people"]["grace"]["roles"] for e in told] == [["operator", "reviewer"], ["operator"]]
    assert told[1].body["people_digest"] == load_site(site.path).people_digest()


def test_the_host_writes_down_what_an_emergency_needs_and_imports_what_was_done_in_one(
    place: Any, journal: Journal
) -> None:
    watch, site = JournalWatch(place.site), place.site
    for name in ("one", "two"):
        version = place.register(fingerprint=place.store.put_files({"fingerprint.json": b"{}"}), name=name)
        journal.start_rollout("demo", version, "ada", "", journal.pointers("demo"))
        journal.promote("demo", version, "host", "", journal.pointers("demo"))
    watch.look(journal)
    assert recall(site).models["demo"].pointers == journal.pointers("demo")
    assert site.ballast_file.stat().st_size == BALLAST_BYTES
    aside = site.home / "aside"
    aside.mkdir()
    for path in site.home.glob("journal.sqlite3*"):
        path.rename(aside / path.name)
    (site.home / "journal.sqlite3").mkdir()
    request = Request("demo", None, None, True, "ada", "night")
    split = lambda *where: follow_pointers(site, *where)  # noqa: E731
    assert rollback_directly(site, request, lambda *_: False, split, lambda *_: [])["stable"] == 1
    (site.home / "journal.sqlite3").rmdir()
    for path in aside.iterdir():
        path.rename(site.home / path.name)
    with Journal.open(site.journal) as again:
        watch.look(again)
        assert again.pointers("demo").stable == 1
        assert again.entries()[-1].body["facts"]["emergency"]["who"] == "ada"
        assert read_tip(site.tip_file).sequence == again.entries()[-1].sequence  # type: ignore[union-attr]


def test_a_journal_that_is_away_for_a_while_is_followed_again(place: Any, journal: Journal, tmp_path: Path) -> None:
    journal.append("demo", "remark", "ada", "", {})
    journal.close()
    file = place.site.journal
    away = replace(place.site, home=place.home / "away")
    away.home.mkdir()
    (away.home / "journal.sqlite3").write_text("not a database. " * 100)
    with JournalWatch(away):
        (away.home / "journal.sqlite3").unlink()
        file.rename(away.home / "journal.sqlite3")
        assert wait_for(lambda: read_tip(away.tip_file)).sequence >= 1
