"""The journal in PostgreSQL, through psycopg; for a site that keeps its journal on another machine.

The URL holds no password (the site refuses one): libpq takes it from PGPASSWORD or its password file. A connection
that the server ended is made anew before the next transaction or read, so a server that restarts is noticed only by the
transaction it interrupted. No wait lasts longer than its limit: a server that is stopped, or a network that swallows
what is sent, gives no answer and no error, and libpq alone would wait for ever. Imported only for such a URL, because
psycopg takes a while to load.
"""

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeVar

import psycopg
import psycopg.abc

from mansard.errors import JournalDamaged, JournalDown, MansardError
from mansard.release.schema import APPEND_ONLY, Row, check_format, make_tables

CONNECT_SECONDS = 5
"""At night nobody waits longer for a server that does not answer."""
STALLED_SECONDS = 5
"""The server ends a transaction whose client says nothing for so long, as where the network swallows: others wait for
its lock."""
LOCK_SECONDS = 6
STATEMENT_SECONDS = 7
ANSWER_SECONDS = 8.0
"""Above the limits that an answering server keeps itself, and a command ends within 10 s."""
SILENT_SECONDS = 2.0
"""So long a server that gave no answer is not asked again: what is queued behind that question fails at once."""
_MAKING = 0x6D616E73617264  # one advisory lock for whoever makes the tables: "mansard" in ASCII
_SETTINGS = (  # a server that answers before a commit is on its disk breaks the journal's promise
    f"SELECT set_config('lock_timeout', '{LOCK_SECONDS}s', false), "
    f"set_config('statement_timeout', '{STATEMENT_SECONDS}s', false), "
    f"set_config('idle_in_transaction_session_timeout', '{STALLED_SECONDS}s', false), "
    "CASE current_setting('synchronous_commit') "
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

T = TypeVar("T")


class _NoAnswer(psycopg.OperationalError):
    """The limit of a wait has passed."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"no answer in {seconds:g} s")
        self.seconds = seconds


class _Connection(psycopg.Connection[Row]):
    """psycopg's, with a limit on each of its waits; after that it is closed, because an answer may still come."""

    answer_seconds = ANSWER_SECONDS

    def wait(self, gen: psycopg.abc.PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        seconds = self.answer_seconds if timeout is None else timeout
        try:
            return super().wait(gen, interval, seconds)
        except psycopg.errors._WaitTimeout as error:
            self.pgconn.finish()
            raise _NoAnswer(seconds) from error


class PostgresDatabase:
    """One connection; the caller keeps two threads from using it at once. `limit_seconds` shortens every wait."""

    def __init__(self, url: str, limit_seconds: float | None = None) -> None:
        self.name = url
        self._connect_seconds = min(CONNECT_SECONDS, limit_seconds or CONNECT_SECONDS)
        self._answer_seconds = min(ANSWER_SECONDS, limit_seconds or ANSWER_SECONDS)
        self._connection: _Connection | None = None
        self._is_inside = False
        self._silent_until, self._silence = 0.0, _NoAnswer(0.0)

    @staticmethod
    def open(url: str, limit_seconds: float | None = None) -> "PostgresDatabase":
        """Connect, and make what is missing. Refuses a newer format; JournalDown where nobody answers."""
        database = PostgresDatabase(url, limit_seconds)
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
        with _errors_named(self.name), self._silence_noted():
            connection = self._connected()
            try:
                return connection.execute(marked, values or None)
            except psycopg.OperationalError as error:
                if self._is_inside or not connection.closed or isinstance(error, _NoAnswer):
                    raise
            return self._connected().execute(marked, values or None)  # the server had ended an idle connection

    @contextlib.contextmanager
    def _silence_noted(self) -> Iterator[None]:
        if time.monotonic() < self._silent_until:
            raise _NoAnswer(self._silence.seconds)
        try:
            yield
        except _NoAnswer as error:
            self._silent_until, self._silence = time.monotonic() + SILENT_SECONDS, error
            raise

    def _connected(self) -> _Connection:
        if self._connection is not None and (self._is_inside or not self._connection.closed):
            return self._connection
        self._connection = _connect(self.name, self._connect_seconds)
        self._connection.answer_seconds = self._answer_seconds
        self._connection.execute(_SETTINGS)
        return self._connection


def _connect(url: str, seconds: float) -> _Connection:
    """In a thread, because libpq's limit is for each address of the server, and name servers have none."""
    answer: Future[_Connection] = Future()

    def connect() -> None:
        try:
            connection = _Connection.connect(
                url, autocommit=True, connect_timeout=2 * CONNECT_SECONDS, prepare_threshold=None
            )
        except psycopg.Error as error:  # raised where it is waited for
            with contextlib.suppress(InvalidStateError):
                answer.set_exception(error)
            return
        try:
            answer.set_result(connection)
        except InvalidStateError:  # nobody waits for it any more
            connection.close()

    threading.Thread(target=connect, name="connect to the journal", daemon=True).start()
    try:
        return answer.result(seconds)
    except TimeoutError as error:
        if answer.cancel():
            raise _NoAnswer(seconds) from error
        return answer.result()


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
