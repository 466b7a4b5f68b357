"""What somebody changed in the journal beside its verbs is found and named."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from mansard.errors import Corrupt, MansardError
from mansard.release.journal import Journal
from tests.mansard.release.journals import Place, filled


def test_entries_can_be_neither_changed_nor_deleted_through_sql(place: Place) -> None:
    filled(place).close()
    for table in ("journal", "versions"):
        for statement in (f"UPDATE {table} SET model = 'x'", f"DELETE FROM {table}"):
            with pytest.raises((sqlite3.IntegrityError, psycopg.errors.RaiseException), match="append-only"):
                change(place, statement)
    if isinstance(place, str):
        with pytest.raises(psycopg.errors.RaiseException, match="append-only"):
            change(place, "TRUNCATE journal CASCADE")


def change(place: Place, *statements: str) -> None:
    """What somebody types into the database."""
    with closing(sqlite3.connect(place) if isinstance(place, Path) else psycopg.connect(place)) as raw:
        for statement in statements:
            raw.execute(statement)  # type: ignore[arg-type]
        raw.commit()


def tamper(place: Place, *statements: str) -> None:
    """Change the database behind the journal's back, as its owner can."""
    if isinstance(place, str):
        change(place, "SET session_replication_role = replica", *statements)
        return
    with closing(sqlite3.connect(place)) as raw:
        triggers = [name for (name,) in raw.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'")]
    change(place, *(f"DROP TRIGGER {name}" for name in triggers), *statements)


@pytest.mark.parametrize("column", ["model", "kind", "at", "who", "why", "previous_digest", "digest"])
def test_an_edited_entry_is_named(place: Place, column: str) -> None:
    filled(place).close()
    tamper(place, f"UPDATE journal SET {column} = {column} || '0' WHERE sequence = 5")
    with Journal.open(place) as journal, pytest.raises(Corrupt, match=r"entry 5 .* was changed"):
        journal.verify()


def test_an_edited_body_is_named(place: Place) -> None:
    filled(place).close()
    tamper(place, "UPDATE journal SET body = replace(body, ':50', ':60') WHERE sequence = 8")
    with Journal.open(place) as journal, pytest.raises(Corrupt, match=r"entry 8 .* was changed"):
        journal.verify()
    tamper(place, "UPDATE journal SET body = 'oops' WHERE sequence = 8")
    with Journal.open(place) as journal, pytest.raises(Corrupt, match="entry 8: its body is not JSON"):
        journal.verify()


def test_removed_and_reordered_entries_are_named(new_place: Callable[[], Place]) -> None:
    first, second = new_place(), new_place()
    filled(first).close()
    tamper(first, "DELETE FROM journal WHERE sequence = 6")
    with Journal.open(first) as journal, pytest.raises(Corrupt, match="entry 6 is missing"):
        journal.verify()
    filled(second).close()
    swap = ("= -1 WHERE sequence = 7", "= 7 WHERE sequence = 8", "= 8 WHERE sequence = -1")
    tamper(second, *(f"UPDATE journal SET sequence {s}" for s in swap))
    with Journal.open(second) as journal, pytest.raises(Corrupt, match=r"entry 7 .* was changed"):
        journal.verify()


def test_an_entry_forged_with_a_right_digest_breaks_the_chain(place: Place) -> None:
    with filled(place) as journal:
        fourth = journal.entries()[3]
    forged = replace(fourth, who="mallory")
    digest = forged.computed_digest()
    tamper(place, f"UPDATE journal SET who = 'mallory', digest = '{digest}' WHERE sequence = 4")
    with Journal.open(place) as journal, pytest.raises(Corrupt, match="entry 5 does not follow entry 4"):
        journal.verify()


def test_a_cut_off_tail_and_moved_pointers_are_found(new_place: Callable[[], Place]) -> None:
    for statement in (
        "DELETE FROM journal WHERE sequence >= 11",
        "UPDATE pointers SET stable = 3",
        "UPDATE term SET number = 3",
    ):
        place = new_place()
        filled(place).close()
        tamper(place, statement)
        with Journal.open(place) as journal, pytest.raises(Corrupt, match="the entries say"):
            journal.verify()
    place = new_place()
    filled(place).close()
    tamper(place, "UPDATE versions SET version = 9 WHERE version = 3")
    with Journal.open(place) as journal, pytest.raises(Corrupt, match="versions table"):
        journal.verify()


def test_a_newer_format_and_a_file_that_is_no_journal_are_refused(place: Place, tmp_path: Path) -> None:
    filled(place).close()
    tamper(place, "UPDATE meta SET value = '2' WHERE name = 'format'")
    with pytest.raises(MansardError, match="format 2, this Mansard reads up to 1"):
        Journal.open(place)
    (tmp_path / "text").write_text("not a database, but long enough to be looked at. " * 100)
    with pytest.raises(Corrupt, match="not a database"):
        Journal.open(tmp_path / "text")
    with pytest.raises(MansardError, match="journal"):
        Journal.open(tmp_path / "text" / "below")
