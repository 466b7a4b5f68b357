"""The journal's tables, and what a database must be able to do for it. Plain SQL over DB-API, the same on each.

What differs is in sqlite_database.py and postgres_database.py: connecting, starting a transaction, triggers, the
parameter mark, and the database's errors in our words.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from mansard.errors import JournalDamaged, MansardError

FORMAT = 1
"""Of the tables. Older ones are read (there are none yet), newer ones refused."""
BUSY_SECONDS = 20
"""So long a writer waits for another one."""

Row = tuple[Any, ...]

TABLES = (
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
APPEND_ONLY = ("journal", "versions")
"""Tables in which triggers refuse UPDATE and DELETE."""


class Database(Protocol):
    """One open database, for one thread at a time. Its errors are JournalDown, JournalDamaged or MansardError."""

    name: str
    """How messages name it: a path or a URL, never with a password."""

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[Row]: ...

    def execute(self, statement: str, values: Sequence[Any] = ()) -> None: ...

    def transaction(self, writes: bool = True) -> AbstractContextManager[None]:
        """All or nothing; one that `writes` shuts out other writers and waits for theirs; both see one state."""
        ...

    def close(self) -> None: ...


def make_tables(database: Database, triggers: Sequence[str]) -> None:
    """Inside a transaction that writes: make what is missing. Several processes may do so at once."""
    for statement in (*TABLES, *triggers):
        database.execute(statement)
    if not database.rows("SELECT value FROM meta"):
        database.execute("INSERT INTO meta (name, value) VALUES ('format', ?)", (str(FORMAT),))
        database.execute("INSERT INTO term (name, number) VALUES ('term', 0)")


def check_format(database: Database) -> None:
    """MansardError for a newer format, JournalDamaged where none is said."""
    rows = database.rows("SELECT value FROM meta WHERE name = 'format'")
    if not rows or not str(rows[0][0]).isdigit():
        raise JournalDamaged(f"journal {database.name}: it does not say its format")
    if int(rows[0][0]) > FORMAT:
        raise MansardError(
            f"journal {database.name}: format {rows[0][0]}, this Mansard reads up to {FORMAT}; use the newer Mansard"
        )
