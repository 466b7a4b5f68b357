"""The journal: the append-only, hash-chained history, and the pointers that it moves. Standard library only, as long
as it is a file; psycopg is loaded for a postgresql:// URL.

Guarantees: an entry and what it changes are one transaction, on the disk when the call returns, all or nothing after
a kill; a pointer moves only by compare-and-swap and raises the global term; one rollout per model at a time; equal
registrations are one version; entries cannot be updated or deleted through SQL, and `verify` names the first one that
was changed around it. Safe for many processes and threads. Not covered: who may do what (approval.py), signatures.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from mansard.canonical import sha256_json
from mansard.errors import BadInput, Conflict
from mansard.records import Registration
from mansard.release import outage, pointer, proof
from mansard.release.events import (
    ABORTED,
    CANARY_STEP,
    EVIDENCE,
    JUDGED,
    MOVES,
    OUTAGES,
    PROMOTED,
    REGISTERED,
    ROLLED_BACK,
    ROLLOUT_STARTED,
    STABLE_DOWN,
    STABLE_UP,
    Entry,
    Pointers,
    Uptime,
    uptime_now,
    utc_now,
)
from mansard.release.ledger import Ledger
from mansard.release.schema import Database
from mansard.release.sqlite_database import SqliteDatabase

__all__ = ["Entry", "Journal", "Pointers"]

Guard = Callable[["Journal", str, str, int, str], None]
"""(journal, model, kind of the move, version that it is about, who): raises where that move is forbidden.

Called inside the move's transaction, after the pointers were compared; what it reads is what is moved.
"""
Facts = Mapping[str, Any] | None
"""More of what happened, as JSON; kept under `facts` in the entry's body."""


class Journal:
    """One open journal. Get it with `Journal.open(place)` and use it as a context manager."""

    def __init__(self, ledger: Ledger, guard: Guard | None) -> None:
        self._ledger = ledger
        self._guard = guard

    @staticmethod
    def open(
        place: Path | str,
        clock: Callable[[], datetime] = utc_now,
        guard: Guard | None = None,
        limit_seconds: float | None = None,
    ) -> "Journal":
        """Open the journal of a site: a path is SQLite's, a postgresql:// URL that server's. Made where there is none.

        Raises JournalDown where nobody answers, MansardError for a newer format. `limit_seconds`: no answer of a server
        is waited for longer; its own limits are for people who can wait (postgres_database.py).
        """
        return Journal(Ledger(_database(place, limit_seconds), clock), guard)

    @property
    def name(self) -> str:
        """Its path or URL."""
        return self._ledger.name

    def close(self) -> None:
        self._ledger.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def entries(self, model: str | None = None, after: int = 0, kinds: Sequence[str] = ()) -> list[Entry]:
        """Entries with a sequence above `after`, in order. `model` leaves out the site's own (people_changed)."""
        return self._ledger.entries(model, after, kinds)

    def entry(self, sequence: int) -> Entry | None:
        return self._ledger.entry(sequence)

    def tip(self) -> Entry | None:
        """The newest entry."""
        return self._ledger.tip()

    def moves(self, model: str) -> list[Entry]:
        """What the rules of pointer.py and outage.py need: decisions, moves, outages, without the many canary steps."""
        kinds = ("approved", "rejected", ROLLOUT_STARTED, PROMOTED, ABORTED, ROLLED_BACK, *OUTAGES)
        return self.entries(model, kinds=kinds)

    def versions(self, model: str) -> list[int]:
        rows = self._ledger.rows("SELECT version FROM versions WHERE model = ? ORDER BY version", (model,))
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
        rows = self._ledger.rows("SELECT stable, canary, previous, term FROM pointers WHERE model = ?", (model,))
        return Pointers(*rows[0]) if rows else Pointers()

    def term(self) -> int:
        """The global term: that of the newest move of any model."""
        return int(self._ledger.rows("SELECT number FROM term WHERE name = 'term'")[0][0])

    def register(self, registration: Registration, signature: str | None) -> int:
        """The version number; an equal registration has one already and adds no entry."""
        model, content = registration.model_name, registration.as_json()
        digest = sha256_json(content)
        with self._ledger.transaction():
            known = self._ledger.rows(
                "SELECT version FROM versions WHERE model = ? AND registration_digest = ?", (model, digest)
            )
            if known:
                return int(known[0][0])
            version = len(self.versions(model)) + 1
            body = {"version": version, "registration": content, "signature": signature}
            entry = self._ledger.append(model, REGISTERED, registration.author, registration.spec_name, body)
            self._ledger.execute(
                "INSERT INTO versions (model, version, registration_digest, sequence) VALUES (?, ?, ?, ?)",
                (model, version, digest, entry.sequence),
            )
        self._ledger.read_back(entry)
        return version

    def judge(self, version: int, registration: Registration, signature: str | None, who: str, why: str) -> Entry:
        """A version judged again: the same candidate with another verdict, baseline, anchor or cost beside it.

        Needs a new approval.
        """
        model = registration.model_name
        with self._ledger.transaction():
            known = self.registration(model, version)
            same = replace(
                registration,
                verdict=known.verdict,
                verdict_record=known.verdict_record,
                item_records=known.item_records,
                baseline_version=known.baseline_version,
                anchor_version=known.anchor_version,
                stages=_but_cost(registration),
            )
            if same != replace(known, stages=_but_cost(known)):
                raise BadInput(f"{model} version {version}: a new verdict may not change the candidate; register it")
            body = {"version": version, "registration": registration.as_json(), "signature": signature}
            entry = self._ledger.append(model, JUDGED, who, why, body)
        self._ledger.read_back(entry)
        return entry

    def append(
        self,
        model: str,
        kind: str,
        who: str,
        why: str,
        body: Mapping[str, Any],
        expected: Pointers | None = None,
        expected_tip: int | None = None,
    ) -> Entry:
        """An entry of any kind that moves nothing and registers nothing (those have verbs of their own).

        Conflict, and no entry, where `expected` is not where the model stands, or entry `expected_tip` not the newest.
        """
        if kind in MOVES or kind in EVIDENCE or kind in OUTAGES:
            raise ValueError(f"a {kind} entry changes more than the journal; use its own verb")
        with self._ledger.transaction():
            self._expect(model, expected, expected_tip)
            entry = self._ledger.append(model, kind, who, why, body)
        self._ledger.read_back(entry)
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

    def stable_down(
        self, model: str, to: int | None, actor: str, why: str, expected: Pointers, since: Uptime, facts: Facts = None
    ) -> Entry:
        """Stable's engine has been dead since `since`, and `to` serves its users. This and the next move no pointer and
        take no term; Conflict when the pointers are not `expected` any more or the rules of outage.py forbid it."""
        body = {"version": expected.stable, "to": to, "since": asdict(since)}
        return self._mark(STABLE_DOWN, model, body, actor, why, expected, facts)

    def stable_up(
        self, model: str, actor: str, why: str, expected: Pointers, since: Uptime, facts: Facts = None
    ) -> Entry:
        """Stable serves its own users again."""
        body = {"version": expected.stable, "since": asdict(since)}
        return self._mark(STABLE_UP, model, body, actor, why, expected, facts)

    def take_emergency(
        self,
        model: str,
        kind: str,
        body: dict[str, Any],
        who: str,
        why: str,
        expected: Pointers,
        least_term: int,
        facts: Facts,
    ) -> int:
        """A move that was made while the database was down (emergency.py), in a term not below the one it had then."""
        return self._move(kind, model, body, who, why, expected, facts, least_term)

    def whole(self) -> proof.Whole:
        """Everything, read at one moment."""
        with self._ledger.transaction(writes=False):
            versions = self._ledger.rows("SELECT model, version, registration_digest, sequence FROM versions")
            rows = self._ledger.rows("SELECT model, stable, canary, previous, term FROM pointers")
            pointers = {str(model): Pointers(*values) for model, *values in rows}
            return proof.Whole(self.name, self.entries(), frozenset(versions), pointers, self.term())

    def verify(self) -> None:
        """Check every entry, the chain, and that pointers, versions and term are what the entries say.

        Raises Corrupt that names the first bad entry.
        """
        proof.check(self.whole())

    def _mark(
        self, kind: str, model: str, body: dict[str, Any], actor: str, why: str, expected: Pointers, facts: Facts
    ) -> Entry:
        with self._ledger.transaction():
            before = self._expect(model, expected)
            new = self._ledger.draft(model, kind, actor, why, {**body, "facts": dict(facts or {})})
            outage.check_outage(self.moves(model), new, before)
            entry = self._ledger.append(model, kind, actor, why, new.body, at=new.at)
        self._ledger.read_back(entry)
        return entry

    def _move(
        self,
        kind: str,
        model: str,
        body: dict[str, Any],
        who: str,
        why: str,
        expected: Pointers,
        facts: Facts,
        least_term: int = 0,
    ) -> int:
        with self._ledger.transaction():
            before = self._expect(model, expected)
            if body["version"] not in self.versions(model):
                raise BadInput(f"{model} has no version {body['version']}; mansard history lists what is registered")
            if kind in (ABORTED, ROLLED_BACK):
                body = {**body, "uptime": asdict(uptime_now())}
            new = self._ledger.draft(model, kind, who, why, {**body, "facts": dict(facts or {})})
            term = self.term()
            after = pointer.after_move(self.moves(model), new, before, max(term + 1, least_term))
            if self._guard is not None:
                self._guard(self, model, kind, int(body["version"]), who)
            self._swap(model, before, after, term)
            places = {"before": _as_json(before), "after": _as_json(after)}
            entry = self._ledger.append(model, kind, who, why, {**new.body, **places}, at=new.at)
        self._ledger.read_back(entry)
        return after.term

    def _expect(self, model: str, expected: Pointers | None, expected_tip: int | None = None) -> Pointers:
        """Where the model stands; Conflict where that, or the newest entry, is not what the caller decided on."""
        before = self.pointers(model)
        if expected is not None and before != expected:
            raise Conflict(
                f"{model}: the pointers moved meanwhile: {before} where {expected} was expected; "
                "look at mansard status, then decide again"
            )
        tip = self.tip() if expected_tip is not None else None
        if tip is not None and tip.sequence != expected_tip:
            raise Conflict(f"{model}: entry {tip.sequence} was written meanwhile; look at mansard history, try again")
        return before

    def _swap(self, model: str, before: Pointers, after: Pointers, term: int) -> None:
        """The compare-and-swap of pointers and term, read back."""
        self._ledger.execute("UPDATE term SET number = ? WHERE name = 'term' AND number = ?", (after.term, term))
        values = (after.stable, after.canary, after.previous, after.term, model)
        if before == Pointers():
            self._ledger.execute(
                "INSERT INTO pointers (stable, canary, previous, term, model) VALUES (?, ?, ?, ?, ?)", values
            )
        else:
            self._ledger.execute(
                "UPDATE pointers SET stable = ?, canary = ?, previous = ?, term = ? WHERE model = ? AND term = ?",
                (*values, before.term),
            )
        if self.pointers(model) != after or self.term() != after.term:
            raise Conflict(f"{model}: term {after.term} was not taken: read back {self.pointers(model)}; try again")


def _as_json(pointers: Pointers) -> dict[str, int | None]:
    return {
        "stable": pointers.stable,
        "canary": pointers.canary,
        "previous": pointers.previous,
        "term": pointers.term,
    }


def _database(place: Path | str, limit_seconds: float | None) -> Database:
    if isinstance(place, Path):
        return SqliteDatabase.open(place)
    from mansard.release.postgres_database import PostgresDatabase  # psycopg takes a while to load

    return PostgresDatabase.open(place, limit_seconds)


def _but_cost(registration: Registration) -> tuple[tuple[str, str, str], ...]:
    """Its stages without the measurement beside the baseline, which is another where the baseline is."""
    return tuple(made for made in registration.stages if made[0] != "cost")
