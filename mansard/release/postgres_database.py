"""The journal in PostgreSQL, through psycopg; for a site that keeps its journal on another machine.

The URL holds no password (the site refuses one): libpq takes it from PGPASSWORD or its password file. A connection
that the server ended is made anew before the next transaction or read, so a server that restarts is noticed only by the
transaction it interrupted. Imported only for such a URL, because psycopg takes a while to load.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import psycopg

from mansard.errors import JournalDamaged, JournalDown, MansardError
from mansard.release.schema import APPEND_ONLY, BUSY_SECONDS, Row, check_format, make_tables

CONNECT_SECONDS = 5
"""At night nobody waits longer for a server that does not answer."""
_MAKING = 0x6D616E73617264  # one advisory lock for whoever makes the tables: "mansard" in ASCII
_SETTINGS = (  # a server that answers before a commit is on its disk breaks the journal's promise
    f"SELECT set_config('lock_timeout', '{BUSY_SECONDS}s', false), "
    f"set_config('statement_timeout', '{2 * BUSY_SECONDS}s', false), CASE current_setting('synchronous_commit') "
    "WHEN 'off' THEN set_config('synchronous_commit', 'on', false) END"
)
_TRIGGERS = (
    "CREATE OR REPLACE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS "
    "$$ BEGIN RAISE EXCEPTION 'the % table is append-only', TG_TABLE_NAME; END $$",
    *(
        f"CREATE OR REPLACE TRIGGER {table}_is_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
        "FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()"
        for table in APPEND_ONLY
    ),
)


class PostgresDatabase:
    """One connection; the caller keeps two threads from using it at once."""

    def __init__(self, url: str) -> None:
        self.name = url
        self._connection: psycopg.Connection[Row] | None = None
        self._is_inside = False

    @staticmethod
    def open(url: str) -> "PostgresDatabase":
        """Connect, and make what is missing. Refuses a newer format; JournalDown where nobody answers."""
        database = PostgresDatabase(url)
        try:
            if database.rows("SELECT to_regclass('meta')") == [(None,)]:
                with database._making():  # looking again here may find an old answer in the server's catalog cache
                    make_tables(database, _TRIGGERS)
            check_format(database)
        except BaseException:
            database.close()
            raise
        return database

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[Row]:
        return self._execute(query, values).fetchall()

    def execute(self, statement: str, values: Sequence[Any] = ()) -> None:
        self._execute(statement, values)

    @contextlib.contextmanager
    def transaction(self, writes: bool = True) -> Iterator[None]:
        """Writers take one lock in turn, and then see what the one before committed."""
        self._begin("BEGIN ISOLATION LEVEL READ COMMITTED" if writes else "BEGIN ISOLATION LEVEL REPEATABLE READ")
        with self._inside():
            if writes:
                self.execute("LOCK TABLE journal IN SHARE ROW EXCLUSIVE MODE")
            yield

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    @contextlib.contextmanager
    def _making(self) -> Iterator[None]:
        self._begin("BEGIN")
        with self._inside():
            self.execute("SELECT pg_advisory_xact_lock(?)", (_MAKING,))
            yield

    def _begin(self, statement: str) -> None:
        self._execute(statement, ())
        self._is_inside = True

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        try:
            yield
            self.execute("COMMIT")
        except BaseException:
            if self._connection is not None and not self._connection.closed:
                self.execute("ROLLBACK")
            raise
        finally:
            self._is_inside = False

    def _execute(self, statement: str, values: Sequence[Any]) -> "psycopg.Cursor[Row]":
        marked = statement.replace("?", "%s") if values else statement
        with _errors_named(self.name):
            connection = self._connected()
            try:
                return connection.execute(marked, values or None)
            except psycopg.OperationalError:
                if self._is_inside or not connection.closed:
                    raise
            return self._connected().execute(marked, values or None)  # the server had ended an idle connection

    def _connected(self) -> "psycopg.Connection[Row]":
        if self._connection is not None and (self._is_inside or not self._connection.closed):
            return self._connection
        self._connection = psycopg.connect(
            self.name, autocommit=True, connect_timeout=CONNECT_SECONDS, prepare_threshold=None
        )
        self._connection.execute(_SETTINGS)
        return self._connection


@contextlib.contextmanager
def _errors_named(name: str) -> Iterator[None]:
    """Nobody answers, a lock, a full disk, a standby: JournalDown; no right: MansardError; damage: JournalDamaged."""
    try:
        yield
    except (psycopg.OperationalError, psycopg.errors.ReadOnlySqlTransaction) as error:
        raise JournalDown(f"journal {name}: {_words(error)}; does the server run, and is its disk full?") from error
    except psycopg.ProgrammingError as error:
        raise MansardError(f"journal {name}: {_words(error)}; may this user use the database?") from error
    except psycopg.DatabaseError as error:
        raise JournalDamaged(f"journal {name}: {_words(error)}; look with: mansard verify --journal") from error


def _words(error: psycopg.Error) -> str:
    return " ".join(str(error).split())
