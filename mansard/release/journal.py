"""The journal: the append-only, hash-chained history, and the pointers that it moves. Standard library only.

Guarantees: an entry and what it changes are one transaction, on the disk when the call returns, all or nothing after
a kill; a pointer moves only by compare-and-swap and raises the global term; one rollout per model at a time; equal
registrations are one version; entries cannot be updated or deleted through SQL, and `verify` names the first one that
was changed around it. Safe for many processes and threads. Not covered: who may do what (approval.py), signatures.
"""

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from mansard.canonical import canonical_json, sha256_json
from mansard.errors import BadInput, Conflict, Corrupt
from mansard.records import Registration
from mansard.release import database, pointer
from mansard.release.events import (
    ABORTED,
    CANARY_STEP,
    EVIDENCE,
    FORMAT,
    GENESIS,
    JUDGED,
    MOVES,
    PROMOTED,
    REGISTERED,
    ROLLED_BACK,
    ROLLOUT_STARTED,
    Entry,
    Pointers,
    as_text,
    utc_now,
)

__all__ = ["Entry", "Journal", "Pointers"]

Row = tuple[Any, ...]
Facts = Mapping[str, Any] | None
"""More of what happened, as JSON; kept under `facts` in the entry's body."""

_COLUMNS = "sequence, model, kind, at, who, why, body, previous_digest, digest, format"


class Journal:
    """One open journal. Get it with `Journal.open(path)` and use it as a context manager."""

    def __init__(self, connection: sqlite3.Connection, path: Path, clock: Callable[[], datetime]) -> None:
        self._connection = connection
        self._path = path
        self._clock = clock
        self._lock = threading.RLock()

    @staticmethod
    def open(path: Path, clock: Callable[[], datetime] = utc_now) -> "Journal":
        """Open the journal of a site, making it where there is none. Raises MansardError for a newer format."""
        with database.errors_named(path):
            return Journal(database.connect(path), path, clock)

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def entries(self, model: str | None = None, after: int = 0, kinds: Sequence[str] = ()) -> list[Entry]:
        """Entries with a sequence above `after`, in order. `model` leaves out the site's own (people_changed)."""
        where, values = ["sequence > ?"], [after]
        for column, wanted in (("model", [] if model is None else [model]), ("kind", list(kinds))):
            if wanted:
                where.append(f"{column} IN ({', '.join('?' * len(wanted))})")
                values += wanted  # type: ignore[arg-type]
        query = f"SELECT {_COLUMNS} FROM journal WHERE {' AND '.join(where)} ORDER BY sequence"  # noqa: S608 - ours
        return [self._entry(row) for row in self._rows(query, tuple(values))]

    def moves(self, model: str) -> list[Entry]:
        """What the rules of pointer.py need: decisions and moves, without the many canary steps."""
        return self.entries(model, kinds=("approved", "rejected", ROLLOUT_STARTED, PROMOTED, ABORTED, ROLLED_BACK))

    def entry(self, sequence: int) -> Entry | None:
        rows = self._rows(f"SELECT {_COLUMNS} FROM journal WHERE sequence = ?", (sequence,))  # noqa: S608 - ours
        return self._entry(rows[0]) if rows else None

    def tip(self) -> Entry | None:
        """The newest entry."""
        rows = self._rows(f"SELECT {_COLUMNS} FROM journal ORDER BY sequence DESC LIMIT 1")  # noqa: S608 - ours
        return self._entry(rows[0]) if rows else None

    def versions(self, model: str) -> list[int]:
        rows = self._rows("SELECT version FROM versions WHERE model = ? ORDER BY version", (model,))
        return [int(row[0]) for row in rows]

    def evidence(self, model: str, version: int) -> Entry:
        """The entry with the newest registration of a version: its first, or the newest `judged`. BadInput if none."""
        found = [e for e in self.entries(model, kinds=EVIDENCE) if e.version == version]
        if not found:
            known = ", ".join(map(str, self.versions(model))) or "none"
            raise BadInput(f"{model} has no version {version}; registered are: {known}")
        return found[-1]

    def registration(self, model: str, version: int) -> Registration:
        """The newest registration of a version. BadInput for an unknown one."""
        return Registration.from_json(self.evidence(model, version).body["registration"])

    def signature(self, model: str, version: int) -> str | None:
        """The author's signature of that registration."""
        found = self.evidence(model, version).body["signature"]
        return None if found is None else str(found)

    def find(self, model: str, artifact: str, spec_digest: str) -> int | None:
        """The newest version that this spec already made with this artifact, whatever its verdict was."""
        for entry in reversed(self.entries(model, kinds=(REGISTERED,))):
            made = entry.body["registration"]
            if (made["artifact"], made["spec_digest"]) == (artifact, spec_digest):
                return entry.version
        return None

    def pointers(self, model: str) -> Pointers:
        """Where a model stands; all None and term 0 for a model without a move."""
        rows = self._rows("SELECT stable, canary, previous, term FROM pointers WHERE model = ?", (model,))
        return Pointers(*rows[0]) if rows else Pointers()

    def term(self) -> int:
        """The global term: that of the newest move of any model."""
        return int(self._rows("SELECT number FROM term WHERE name = 'term'")[0][0])

    def register(self, registration: Registration, signature: str | None) -> int:
        """The version number; an equal registration has one already and adds no entry."""
        model, content = registration.model_name, registration.as_json()
        digest = sha256_json(content)
        with self._transaction():
            known = self._rows(
                "SELECT version FROM versions WHERE model = ? AND registration_digest = ?", (model, digest)
            )
            if known:
                return int(known[0][0])
            version = len(self.versions(model)) + 1
            body = {"version": version, "registration": content, "signature": signature}
            entry = self._append(model, REGISTERED, registration.author, registration.spec_name, body)
            self._execute(
                "INSERT INTO versions (model, version, registration_digest, sequence) VALUES (?, ?, ?, ?)",
                (model, version, digest, entry.sequence),
            )
        self._read_back(entry)
        return version

    def judge(self, version: int, registration: Registration, signature: str | None, who: str, why: str) -> Entry:
        """A version judged again: the same candidate with another verdict, baseline or anchor. Needs a new approval."""
        model = registration.model_name
        with self._transaction():
            known = self.registration(model, version)
            same = replace(
                registration,
                verdict=known.verdict,
                verdict_record=known.verdict_record,
                item_records=known.item_records,
                baseline_version=known.baseline_version,
                anchor_version=known.anchor_version,
            )
            if same != known:
                raise BadInput(f"{model} version {version}: a new verdict may not change the candidate; register it")
            body = {"version": version, "registration": registration.as_json(), "signature": signature}
            entry = self._append(model, JUDGED, who, why, body)
        self._read_back(entry)
        return entry

    def append(self, model: str, kind: str, who: str, why: str, body: Mapping[str, Any]) -> Entry:
        """An entry that moves nothing and registers nothing (those have verbs of their own)."""
        if kind in MOVES or kind in EVIDENCE:
            raise ValueError(f"a {kind} entry changes more than the journal; use its own verb")
        with self._transaction():
            entry = self._append(model, kind, who, why, body)
        self._read_back(entry)
        return entry

    def start_rollout(
        self, model: str, version: int, who: str, why: str, expected: Pointers, facts: Facts = None
    ) -> int:
        """`version` becomes the canary. This and the next four return the new term and raise Conflict, moving nothing,
        when the pointers are not `expected` any more or the rules of pointer.py forbid it."""
        return self._move(ROLLOUT_STARTED, model, {"version": version}, who, why, expected, facts)

    def step(
        self,
        model: str,
        version: int,
        weight_percent: int,
        who: str,
        why: str,
        expected: Pointers,
        facts: Facts = None,
    ) -> int:
        """The canary takes another share; recorded before the split changes."""
        body = {"version": version, "weight_percent": weight_percent}
        return self._move(CANARY_STEP, model, body, who, why, expected, facts)

    def promote(self, model: str, version: int, who: str, why: str, expected: Pointers, facts: Facts = None) -> int:
        """The canary becomes stable."""
        return self._move(PROMOTED, model, {"version": version}, who, why, expected, facts)

    def abort(self, model: str, version: int, who: str, why: str, expected: Pointers, facts: Facts = None) -> int:
        """The rollout ends; stable stays."""
        return self._move(ABORTED, model, {"version": version}, who, why, expected, facts)

    def rollback(self, model: str, to: int, who: str, why: str, expected: Pointers, facts: Facts = None) -> int:
        """Stable goes from `expected.stable` to `to`, which was once stable."""
        pointer.rollback_target(self.moves(model), model, to)
        return self._move(ROLLED_BACK, model, {"version": expected.stable, "to": to}, who, why, expected, facts)

    def verify(self) -> None:
        """Check every entry, the chain, and that pointers, versions and term are what the entries say.

        Raises Corrupt that names the first bad entry.
        """
        with self._transaction(writes=False):
            entries = self.entries()
            _check_chain(entries, self._path)
            versions = {
                (e.model, e.version, sha256_json(e.body["registration"]), e.sequence)
                for e in entries
                if e.kind == REGISTERED
            }
            listed = set(self._rows("SELECT model, version, registration_digest, sequence FROM versions"))
            moves = {e.model: e for e in entries if e.kind in MOVES}
            told = {m: Pointers(**e.body["after"]) for m, e in moves.items()}
            rows = self._rows("SELECT model, stable, canary, previous, term FROM pointers")
            stored = {model: Pointers(*values) for model, *values in rows}
            term = self.term()
        if versions != listed:
            odd = sorted(map(str, versions ^ listed))[0]
            raise Corrupt(f"journal {self._path}: the versions table and the registered entries differ at {odd}")
        if told != stored or term != max((p.term for p in told.values()), default=0):
            last = entries[-1].sequence if entries else 0
            raise Corrupt(
                f"journal {self._path}: after entry {last} the pointers are {stored}, term {term}, but the entries say "
                f"{told}: entries were cut off, or pointers changed without an entry"
            )

    def _move(
        self,
        kind: str,
        model: str,
        body: dict[str, Any],
        who: str,
        why: str,
        expected: Pointers,
        facts: Facts,
    ) -> int:
        with self._transaction():
            before = self.pointers(model)
            if before != expected:
                raise Conflict(
                    f"{model}: the pointers moved meanwhile: {before} where {expected} was expected; "
                    "look at mansard status, then decide again"
                )
            if body["version"] not in self.versions(model):
                raise BadInput(f"{model} has no version {body['version']}; mansard history lists what is registered")
            new = self._draft(model, kind, who, why, {**body, "facts": dict(facts or {})})
            after = pointer.after_move(self.moves(model), new, before, self.term() + 1)
            self._swap(model, before, after)
            places = {"before": _as_json(before), "after": _as_json(after)}
            entry = self._append(model, kind, who, why, {**new.body, **places}, at=new.at)
        self._read_back(entry)
        return after.term

    def _swap(self, model: str, before: Pointers, after: Pointers) -> None:
        """The compare-and-swap of pointers and term, read back."""
        self._execute("UPDATE term SET number = ? WHERE name = 'term' AND number = ?", (after.term, after.term - 1))
        values = (after.stable, after.canary, after.previous, after.term, model)
        if before == Pointers():
            self._execute(
                "INSERT INTO pointers (stable, canary, previous, term, model) VALUES (?, ?, ?, ?, ?)", values
            )
        else:
            self._execute(
                "UPDATE pointers SET stable = ?, canary = ?, previous = ?, term = ? WHERE model = ? AND term = ?",
                (*values, before.term),
            )
        if self.pointers(model) != after or self.term() != after.term:
            raise Conflict(f"{model}: term {after.term} was not taken: read back {self.pointers(model)}; try again")

    def _append(
        self, model: str, kind: str, who: str, why: str, body: Mapping[str, Any], at: str | None = None
    ) -> Entry:
        entry = self._draft(model, kind, who, why, body, at)
        entry = replace(entry, digest=entry.computed_digest())
        self._execute(
            f"INSERT INTO journal ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608 - ours
            (
                *(entry.sequence, entry.model, entry.kind, entry.at, entry.who, entry.why),
                *(canonical_json(entry.body).decode(), entry.previous_digest, entry.digest, entry.format),
            ),
        )
        return entry

    def _draft(
        self, model: str, kind: str, who: str, why: str, body: Mapping[str, Any], at: str | None = None
    ) -> Entry:
        """The next entry, without its digest. The body takes the form that it is read back in."""
        tip = self.tip()
        try:
            content = json.loads(canonical_json(dict(body)))
            canonical_json([who, why])
        except (TypeError, ValueError) as error:  # no JSON value, NaN, or text that is not Unicode
            raise BadInput(f"{kind} entry of {model} by {who!a}: not JSON: {error}") from error
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

    def _read_back(self, entry: Entry) -> None:
        """What was committed is there."""
        if self.entry(entry.sequence) != entry:
            raise Corrupt(f"journal {self._path}: entry {entry.sequence} was written but not read back")

    def _entry(self, row: Row) -> Entry:
        sequence, model, kind, at, who, why, body, previous_digest, digest, form = row
        try:
            content = json.loads(body)
        except (TypeError, ValueError) as error:
            raise Corrupt(f"journal {self._path}: entry {sequence}: its body is not JSON") from error
        if not isinstance(content, dict) or form != FORMAT:
            raise Corrupt(f"journal {self._path}: entry {sequence}: format {form!r}; {FORMAT} is expected")
        return Entry(sequence, model, kind, at, who, why, content, previous_digest, digest, form)

    @contextmanager
    def _transaction(self, writes: bool = True) -> Iterator[None]:
        with self._lock, database.errors_named(self._path), database.transaction(self._connection, writes):
            yield

    def _rows(self, query: str, values: Row = ()) -> list[Row]:
        with self._lock, database.errors_named(self._path):
            return self._connection.execute(query, values).fetchall()

    def _execute(self, statement: str, values: Row) -> None:
        self._connection.execute(statement, values)


def _check_chain(entries: Sequence[Entry], path: Path) -> None:
    before = GENESIS
    for number, entry in enumerate(entries, 1):
        if entry.sequence != number:
            raise Corrupt(f"journal {path}: entry {number} is missing; the next one there is {entry.sequence}")
        if entry.digest != entry.computed_digest():
            raise Corrupt(
                f"journal {path}: entry {number} ({entry.kind} {entry.model}, {entry.at}) was changed: its content has "
                f"digest {entry.computed_digest()[:12]}, recorded is {entry.digest[:12]}"
            )
        if entry.previous_digest != before:
            raise Corrupt(f"journal {path}: entry {number} does not follow entry {number - 1}: one was replaced")
        before = entry.digest


def _as_json(pointers: Pointers) -> dict[str, int | None]:
    return {
        "stable": pointers.stable,
        "canary": pointers.canary,
        "previous": pointers.previous,
        "term": pointers.term,
    }
