"""The journal in one SQLite file (WAL, every commit synced): the default, and all that one host needs."""

import contextlib
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mansard.errors import JournalDamaged, JournalDown
from mansard.release.schema import APPEND_ONLY, BUSY_SECONDS, Row, check_format, make_tables

_TRIGGERS = tuple(
    f"CREATE TRIGGER IF NOT EXISTS {table}_is_append_only_{verb.lower()} BEFORE {verb} ON {table} "
    f"BEGIN SELECT RAISE(ABORT, 'the {table} table is append-only'); END"
    for table in APPEND_ONLY
    for verb in ("UPDATE", "DELETE")
)


class SqliteDatabase:
    """One connection; the caller keeps two threads from using it at once."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self.name = str(path)

    @staticmethod
    def open(path: Path) -> "SqliteDatabase":
        """Open, and make what is missing. Refuses a newer format."""
        with _errors_named(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            database = SqliteDatabase(connection, path)
            try:
                _use_wal(connection)
                connection.execute("PRAGMA synchronous=FULL")
                connection.execute("PRAGMA foreign_keys=ON")
                if not database.rows("SELECT 1 FROM sqlite_master WHERE name = 'meta'"):
                    with database.transaction():
                        make_tables(database, _TRIGGERS)
                check_format(database)
            except BaseException:
                connection.close()
                raise
            return database

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[Row]:
        with _errors_named(self.name):
            return self._connection.execute(query, values).fetchall()

    def execute(self, statement: str, values: Sequence[Any] = ()) -> None:
        with _errors_named(self.name):
            self._connection.execute(statement, values)

    @contextlib.contextmanager
    def transaction(self, writes: bool = True) -> Iterator[None]:
        self.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
        try:
            yield
            self.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self.execute("ROLLBACK")
            raise

    def close(self) -> None:
        self._connection.close()


@contextlib.contextmanager
def _errors_named(name: str) -> Iterator[None]:
    """A damaged file is JournalDamaged; a lock, a full disk or a lost file is JournalDown."""
    try:
        yield
    except sqlite3.ProgrammingError:  # a closed journal: our own mistake
        raise
    except (sqlite3.OperationalError, OSError) as error:
        raise JournalDown(f"journal {name}: {error}; is the disk full, or does another process hold it?") from error
    except sqlite3.DatabaseError as error:
        raise JournalDamaged(f"journal {name}: {error}; bring a copy back, then: mansard verify --journal") from error


def _use_wal(connection: sqlite3.Connection) -> None:
    """SQLite answers 'locked' at once, without its busy timeout, when two connections switch to WAL together."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
