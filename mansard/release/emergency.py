"""Rollbacks while the journal's database is down: written to a local file first, in a higher term, imported later.

Guarantees: an entry is on the disk before the traffic split shows it; entries follow each other by digests; operators
at once take turns (a lock), so decision 10's rules hold here too; once the journal is back they become its entries, in
their order, each once however often an import is killed. An import brings the journal's pointers to where users are
served from; where the journal had moved in between, that is said in the entry (`conflict`), and status, history and
verify show it. Standard library only.
"""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mansard.canonical import canonical_json, sha256_json
from mansard.errors import Conflict, Corrupt
from mansard.release.events import (
    ABORTED,
    EMERGENCY,
    GENESIS,
    ROLLED_BACK,
    Entry,
    Pointers,
    as_text,
    uptime_now,
    utc_now,
)
from mansard.release.journal import Journal
from mansard.release.pointer import RollbackPlan, after_move, once_stable
from mansard.site import Site

TERM_STEP = 1000
"""The journal may have handed out terms that never reached the split; the first emergency term is above those too."""


@dataclass(frozen=True, slots=True)
class Emergency:
    """One move. `kind` is aborted or rolled_back (then stable went from `version` to `to`); terms are global.

    `seen_*` name the newest journal entry that this machine remembered.
    """

    format: int
    number: int
    term: int
    model: str
    kind: str
    version: int
    to: int | None
    at: str
    uptime: dict[str, Any]
    who: str
    why: str
    before: dict[str, int | None]
    after: dict[str, int | None]
    seen_sequence: int
    seen_digest: str
    previous_digest: str
    digest: str = ""

    def computed_digest(self) -> str:
        """What `digest` must be."""
        return sha256_json({k: v for k, v in asdict(self).items() if k != "digest"})

    def as_entry(self) -> Entry:
        """The move as the rules of pointer.py read it; its sequence is above every remembered one."""
        body = {"version": self.version, "uptime": self.uptime, "emergency": True}
        if self.to is not None:
            body["to"] = self.to
        sequence = self.seen_sequence + self.number
        return Entry(sequence, self.model, self.kind, self.at, self.who, self.why, body, "", self.digest)


@contextlib.contextmanager
def locked(site: Site) -> Iterator[None]:
    """One writer or importer at a time."""
    site.home.mkdir(parents=True, exist_ok=True)
    path = site.emergency_file.with_name(f".{site.emergency_file.name}.lock")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def waiting(site: Site) -> list[Emergency]:
    """Entries that wait for the journal, in order. A half-written last line was never acted on and is left out.

    Corrupt names the first line that was changed.
    """
    try:
        lines = site.emergency_file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    found: list[Emergency] = []
    for number, line in enumerate(lines[:-1], 1):  # what comes after the last line's end is half a line, or nothing
        try:
            made = Emergency(**json.loads(line))
            is_right = made.format == 1 and made.number == number and made.digest == made.computed_digest()
        except (ValueError, TypeError) as error:
            raise Corrupt(f"{site.emergency_file}: line {number}: not an emergency entry: {error}") from error
        if not is_right or (found and made.previous_digest != found[-1].digest):
            raise Corrupt(f"{site.emergency_file}: line {number} was changed, or the one before it is gone")
        found.append(made)
    return found


def write(
    site: Site,
    known: Sequence[Emergency],
    model: str,
    plan: RollbackPlan,
    before: Pointers,
    moves: Sequence[Entry],
    floor: int,
    seen: tuple[int, str],
    who: str,
    why: str,
) -> Emergency:
    """Append the planned move, under `locked`. `known` is what `waiting` told, `floor` the highest term seen."""
    assert plan.version is not None, "a plan that moves or aborts names its version"
    kind = ABORTED if plan.action == "abort" else ROLLED_BACK
    term = max(floor, known[-1].term) + 1 if known else floor + TERM_STEP
    body: dict[str, Any] = {"version": plan.version, **({} if plan.to is None else {"to": plan.to})}
    sequence = moves[-1].sequence + 1 if moves else 1
    draft = Entry(sequence, model, kind, as_text(utc_now()), who, why, body, "", "")
    after = after_move(moves, draft, before, term)
    made = Emergency(
        format=1,
        number=len(known) + 1,
        term=term,
        model=model,
        kind=kind,
        version=plan.version,
        to=plan.to,
        at=draft.at,
        uptime=asdict(uptime_now()),
        who=who,
        why=why,
        before=asdict(before),
        after=asdict(after),
        seen_sequence=seen[0],
        seen_digest=seen[1],
        previous_digest=known[-1].digest if known else GENESIS,
    )
    made = replace(made, digest=made.computed_digest())
    _append(site, len(known), canonical_json(asdict(made)) + b"\n")
    return made


def import_waiting(site: Site, journal: Journal) -> list[Entry]:
    """Make journal entries of what waits, in order, and take the file away. Returns those that hold a conflict."""
    if not site.emergency_file.exists():
        return []
    conflicts: list[Entry] = []
    journal.tip()  # a server that gives no answer is waited for here: an operator waits for the lock
    with locked(site):
        records = waiting(site)
        begun = [n for n, made in enumerate(records) if _imported(journal, made)]
        for made in records[begun[-1] if begun else 0 :]:  # an import that was killed goes on where it was
            conflicts += _import(journal, made)
        site.emergency_file.unlink(missing_ok=True)
    return conflicts


def conflicts_of(entries: Sequence[Entry]) -> list[Entry]:
    """Imported entries that found the journal elsewhere than where their operator had seen it."""
    return [e for e in entries if e.body.get("facts", {}).get("conflict")]


def _import(journal: Journal, made: Emergency) -> list[Entry]:
    """One entry's moves; those that an earlier import made are not made again."""
    is_begun, found = bool(_imported(journal, made)), journal.pointers(made.model)
    conflict = "" if is_begun else _conflict(made, found)
    moves = _moves(journal, made, found)
    if not moves and not is_begun:
        moves = [(EMERGENCY, {"version": made.version})]
    for kind, body in moves:
        facts = {"emergency": asdict(made), **({"conflict": conflict} if conflict else {})}
        expected = journal.pointers(made.model)
        journal.take_emergency(made.model, kind, body, made.who, made.why, expected, made.term, facts)
    return conflicts_of(_imported(journal, made)[-1:])


def _imported(journal: Journal, made: Emergency) -> list[Entry]:
    """Entries that this emergency entry became already."""
    kinds = (ABORTED, ROLLED_BACK, EMERGENCY)
    return [
        e
        for e in journal.entries(made.model, kinds=kinds)
        if e.body.get("facts", {}).get("emergency", {}).get("digest") == made.digest
    ]


def _moves(journal: Journal, made: Emergency, found: Pointers) -> list[tuple[str, dict[str, Any]]]:
    """What brings the journal to where the emergency entry left the users; nothing where no rule allows it."""
    wanted = made.after["stable"]
    moves: list[tuple[str, dict[str, Any]]] = []
    if found.canary is not None:
        moves.append((ABORTED, {"version": found.canary}))
    if wanted is not None and found.stable != wanted and wanted in once_stable(journal.moves(made.model), made.model):
        moves.append((ROLLED_BACK, {"version": found.stable, "to": wanted}))
    return moves


def _conflict(made: Emergency, found: Pointers) -> str:
    """How the journal differs from what the operator had seen; empty when it does not."""
    then, now = (made.before["stable"], made.before["canary"]), (found.stable, found.canary)
    if then == now:
        return ""
    return (
        f"the operator saw stable {then[0]} and canary {then[1]}, the journal had stable {now[0]} and canary {now[1]}; "
        f"users are served by {made.after['stable']} since {made.at}"
    )


def _append(site: Site, num_lines: int, line: bytes) -> None:
    """After the whole lines, over a half-written one; on the disk when it returns, or not there at all."""
    with site.emergency_file.open("a+b", buffering=0) as file:
        file.seek(0)
        end = sum(len(part) for part in file.read().splitlines(keepends=True)[:num_lines])
        file.truncate(end)
        try:
            num_bytes = file.write(line)
            if num_bytes != len(line):
                raise OSError(errno.ENOSPC, f"{site.emergency_file}: {num_bytes} of {len(line)} bytes written")
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise
    folder = os.open(site.home, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def refuse_forward(site: Site, model: str) -> None:
    """Conflict while emergency entries wait: no version goes forward from where the journal wrongly believes to be."""
    if site.emergency_file.exists():
        raise Conflict(
            f"{model}: emergency entries in {site.emergency_file} wait for their import; the host does that within a "
            "second (mansard up, mansard status), then try again"
        )
