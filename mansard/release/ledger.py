"""The chain of entries in a database: read them, append to them, one transaction at a time.

Guarantees: an entry follows the one before by its digest; what is appended is read back; threads take turns. Not
covered: what entries mean (journal.py), and finding out whether somebody changed them (proof.py).
"""

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from typing import Any

from mansard.canonical import canonical_json
from mansard.errors import BadInput, JournalDamaged
from mansard.release.events import FORMAT, GENESIS, Entry, as_text
from mansard.release.schema import Database, Row

_COLUMNS = "sequence, model, kind, at, who, why, body, previous_digest, digest, format"


class Ledger:
    """Entries of one open database."""

    def __init__(self, database: Database, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._clock = clock
        self._lock = threading.RLock()
        self.name = database.name

    def close(self) -> None:
        with self._lock:
            self._database.close()

    @contextmanager
    def transaction(self, writes: bool = True) -> Iterator[None]:
        with self._lock, self._database.transaction(writes):
            yield

    def rows(self, query: str, values: Row = ()) -> list[Row]:
        with self._lock:
            return self._database.rows(query, values)

    def execute(self, statement: str, values: Row) -> None:
        """Inside a transaction."""
        self._database.execute(statement, values)

    def entries(self, model: str | None = None, after: int = 0, kinds: Sequence[str] = ()) -> list[Entry]:
        """Entries with a sequence above `after`, in order. `model` leaves out the site's own (people_changed)."""
        where, values = ["sequence > ?"], [after]
        for column, wanted in (("model", [] if model is None else [model]), ("kind", list(kinds))):
            if wanted:
                where.append(f"{column} IN ({', '.join('?' * len(wanted))})")
                values += wanted  # type: ignore[arg-type]
        query = f"SELECT {_COLUMNS} FROM journal WHERE {' AND '.join(where)} ORDER BY sequence"  # noqa: S608 - ours
        return [self._entry(row) for row in self.rows(query, tuple(values))]

    def entry(self, sequence: int) -> Entry | None:
        rows = self.rows(f"SELECT {_COLUMNS} FROM journal WHERE sequence = ?", (sequence,))  # noqa: S608 - ours
        return self._entry(rows[0]) if rows else None

    def tip(self) -> Entry | None:
        """The newest entry."""
        rows = self.rows(f"SELECT {_COLUMNS} FROM journal ORDER BY sequence DESC LIMIT 1")  # noqa: S608 - ours
        return self._entry(rows[0]) if rows else None

    def append(
        self, model: str, kind: str, who: str, why: str, body: Mapping[str, Any], at: str | None = None
    ) -> Entry:
        """Inside a transaction; `read_back` it after that."""
        entry = self.draft(model, kind, who, why, body, at)
        entry = replace(entry, digest=entry.computed_digest())
        self.execute(
            f"INSERT INTO journal ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608 - ours
            (
                *(entry.sequence, entry.model, entry.kind, entry.at, entry.who, entry.why),
                *(canonical_json(entry.body).decode(), entry.previous_digest, entry.digest, entry.format),
            ),
        )
        return entry

    def draft(
        self, model: str, kind: str, who: str, why: str, body: Mapping[str, Any], at: str | None = None
    ) -> Entry:
        """The next entry, without its digest. The body takes the form that it is read back in."""
        tip = self.tip()
        try:
            content = json.loads(canonical_json(dict(body)))
            canonical_json([who, why])
        except (TypeError, ValueError) as error:  # no JSON value, NaN, or text that is not Unicode
            raise BadInput(f"{kind} entry of {model} by {who!a}: not JSON: {error}") from error
        if "\0" in model + kind + who + why:  # PostgreSQL has no such text
            raise BadInput(f"{kind} entry of {model!a} by {who!a}: text with a NUL character in it: {why!a:.80}")
        return Entry(
            sequence=1 if tip is None else tip.sequence + 1,
            model=model,
            kind=kind,
            at=at or as_text(self._clock()),
            who=who,
            why=why,
            body=content,
            previous_digest=GENESIS if tip is None else tip.digest,
            digest="",
        )

    def read_back(self, entry: Entry) -> None:
        """What was committed is there."""
        if self.entry(entry.sequence) != entry:
            raise JournalDamaged(f"journal {self.name}: entry {entry.sequence} was written but not read back")

    def _entry(self, row: Row) -> Entry:
        sequence, model, kind, at, who, why, body, previous_digest, digest, form = row
        try:
            content = json.loads(body)
        except (TypeError, ValueError) as error:
            raise JournalDamaged(f"journal {self.name}: entry {sequence}: its body is not JSON") from error
        if not isinstance(content, dict) or form != FORMAT:
            raise JournalDamaged(f"journal {self.name}: entry {sequence}: format {form!r}; {FORMAT} is expected")
        return Entry(sequence, model, kind, at, who, why, content, previous_digest, digest, form)
