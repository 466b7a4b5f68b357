"""The journal's database: schema, connection, transactions, and its errors in our words. SQLite is touched only here.

The statements are plain SQL over DB-API. What another database needs differently is in this file: `connect`, `begin`,
the triggers, and the parameter mark `?`.
"""

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from mansard.errors import Corrupt, MansardError

FORMAT = 1
"""Of the tables. Older ones are read (there are none yet), newer ones refused."""
BUSY_SECONDS = 20

_TABLES = (
    "CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS journal (sequence BIGINT PRIMARY KEY, format BIGINT NOT NULL, model TEXT NOT NULL, "
    "kind TEXT NOT NULL, at TEXT NOT NULL, who TEXT NOT NULL, why TEXT NOT NULL, body TEXT NOT NULL, "
    "previous_digest TEXT NOT NULL UNIQUE, digest TEXT NOT NULL UNIQUE)",
    "CREATE INDEX IF NOT EXISTS journal_of_model ON journal (model, kind, sequence)",
    "CREATE TABLE IF NOT EXISTS versions (model TEXT NOT NULL, version BIGINT NOT NULL, "
    "registration_digest TEXT NOT NULL, sequence BIGINT NOT NULL UNIQUE REFERENCES journal (sequence), "
    "PRIMARY KEY (model, version), UNIQUE (model, registration_digest))",
    "CREATE TABLE IF NOT EXISTS pointers (model TEXT PRIMARY KEY, stable BIGINT, canary BIGINT, previous BIGINT, "
    "term BIGINT NOT NULL UNIQUE)",
    "CREATE TABLE IF NOT EXISTS term (name TEXT PRIMARY KEY, number BIGINT NOT NULL)",
)
_TRIGGERS = tuple(
    f"CREATE TRIGGER IF NOT EXISTS {table}_is_append_only_{verb.lower()} BEFORE {verb} ON {table} "
    f"BEGIN SELECT RAISE(ABORT, 'the {table} table is append-only'); END"
    for table in ("journal", "versions")
    for verb in ("UPDATE", "DELETE")
)


def connect(path: Path) -> sqlite3.Connection:
    """Open, and make what is missing. Several processes may do so at once. Refuses a newer format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        _use_wal(connection)
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        _make(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def begin(connection: sqlite3.Connection, writes: bool) -> None:
    """Start a transaction. One that `writes` shuts out other writers and waits for theirs; both see one state."""
    connection.execute("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection, writes: bool = True) -> Iterator[None]:
    """All or nothing: what is inside is on the disk when this ends without an error."""
    begin(connection, writes)
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """SQLite's errors as ours: a damaged file is Corrupt; a lock, a full disk or a lost file is infrastructure."""
    try:
        yield
    except sqlite3.ProgrammingError:  # a closed journal: our own mistake
        raise
    except (sqlite3.OperationalError, OSError) as error:
        raise MansardError(f"journal {path}: {error}; is the disk full, or does another process hold it?") from error
    except sqlite3.DatabaseError as error:
        raise Corrupt(f"journal {path}: {error}; bring a copy back, then: mansard verify --journal") from error


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


def _make(connection: sqlite3.Connection, path: Path) -> None:
    known = connection.execute("SELECT COUNT(*) FROM sqlite_master WHERE name = 'meta'").fetchone()[0]
    if not known:
        with transaction(connection):
            for statement in (*_TABLES, *_TRIGGERS):
                connection.execute(statement)
            if connection.execute("SELECT COUNT(*) FROM meta").fetchone()[0] == 0:
                connection.execute("INSERT INTO meta (name, value) VALUES ('format', ?)", (str(FORMAT),))
                connection.execute("INSERT INTO term (name, number) VALUES ('term', 0)")
    row = connection.execute("SELECT value FROM meta WHERE name = 'format'").fetchone()
    if row is None or not str(row[0]).isdigit():
        raise Corrupt(f"journal {path}: it does not say its format")
    if int(row[0]) > FORMAT:
        raise MansardError(f"journal {path}: format {row[0]}, this Mansard reads up to {FORMAT}; use the newer Mansard")
