"""What only a database server can do to the journal: be down, restart, refuse."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from mansard.errors import BadInput, JournalDown, MansardError
from mansard.records import Registration
from mansard.release.journal import Journal
from mansard.site import Site, load_site

Make = Callable[..., Registration]


@pytest.fixture
def running(postgres: Any) -> Iterator[Any]:
    """The server, which the test may stop; it runs again afterwards."""
    yield postgres
    postgres.stop()
    postgres.start()


def test_a_server_that_is_down_is_one_line_and_exit_1(running: Any) -> None:
    url = running.new_journal()
    running.stop()
    with pytest.raises(JournalDown, match=r"journal postgresql://.*does the server run") as caught:
        Journal.open(url)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


def test_an_open_journal_outlives_a_restart_of_the_server(running: Any, candidate: Make) -> None:
    with Journal.open(running.new_journal()) as journal:
        journal.register(candidate("one"), None)
        running.stop()
        for ask in (journal.tip, lambda: journal.register(candidate("two"), None)):
            with pytest.raises(JournalDown):
                ask()
        running.start()
        assert journal.register(candidate("two"), None) == 2
        running.stop()
        running.start()
        assert journal.pointers("demo").term == 0
        assert journal.start_rollout("demo", 1, "ada", "", journal.pointers("demo")) == 1
        journal.verify()


def test_a_server_that_dies_inside_a_transaction_changed_nothing(running: Any, candidate: Make) -> None:
    def dies(*_: object) -> None:
        running.stop()

    place = running.new_journal()
    with Journal.open(place) as journal:
        journal.register(candidate("one"), None)
        before = journal.entries()
    with Journal.open(place, guard=dies) as dying, pytest.raises(JournalDown):
        dying.start_rollout("demo", 1, "ada", "", dying.pointers("demo"))
    running.start()
    with Journal.open(place) as journal:
        assert (journal.entries(), journal.term()) == (before, 0)
        journal.verify()


def test_a_user_without_rights_and_an_unknown_database_are_one_line(postgres: Any) -> None:
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
        connection.execute("CREATE ROLE stranger LOGIN")
    stranger = postgres.new_journal().replace("mansard@", "stranger@", 1)
    with pytest.raises(MansardError, match="may this user use the database"):
        Journal.open(stranger)
    with pytest.raises(JournalDown, match='database "nowhere" does not exist'):
        Journal.open(postgres.url("nowhere"))


def test_commits_are_synced_even_where_the_database_says_otherwise(postgres: Any) -> None:
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
        connection.execute("CREATE ROLE hasty LOGIN SUPERUSER")
        connection.execute("ALTER ROLE hasty SET synchronous_commit = off")
    url = postgres.new_journal().replace("mansard@", "hasty@", 1)
    with Journal.open(url) as journal:
        assert journal._ledger.rows("SHOW synchronous_commit") == [("on",)]


def with_journal(site: Site, url: str) -> Path:
    site.path.write_text(site.path.read_text().replace("home: .\n", f"home: .\njournal: {url!r}\n"))
    return site.path


def test_the_site_names_the_journals_server(site: Site, postgres: Any, candidate: Make) -> None:
    site = load_site(with_journal(site, postgres.new_journal()))
    with Journal.open(site.journal) as journal:
        assert journal.register(candidate("one"), None) == 1
    assert not (site.home / "journal.sqlite3").exists()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://host/db", "is not postgresql://USER@HOST/DATABASE"),
        ("journal.sqlite3", "leave the key out for a file of SQLite"),
        ("postgresql://[::1/db", "is not postgresql://"),
        ("postgresql://ada:secret@host/db", "set PGPASSWORD"),
        ("postgresql://host/db?password=secret", "set PGPASSWORD"),
    ],
)
def test_a_url_that_is_wrong_or_holds_a_password_is_refused(site: Site, url: str, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        load_site(with_journal(site, url))
    assert "secret" not in str(caught.value)
