"""A rollback without the host: journal and traffic split are moved from here, and the split alone where the journal's
database is down too (then the move waits in the emergency file for its import).

Guarantees: the rules of decision 10 either way; safe to repeat, also after a kill between any two writes; a full disk
is given room (ballast.py); `hard` ends the engine of the version that is left, once the split has moved, as the host
does; a store in a bucket is asked after that (target_check.py). Not covered: a kill just before that; the same command
again moves nothing, and ends nothing. Standard library only until a target's digests are checked, which loads BLAKE3.
"""

import functools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mansard.errors import BadInput, Conflict, Corrupt, JournalDamaged, JournalDown, MansardError
from mansard.release import emergency
from mansard.release.ballast import with_room
from mansard.release.events import Entry, Pointers, uptime_now, utc_now
from mansard.release.journal import Journal
from mansard.release.memory import Memory, Remembered, recall, remember, with_split
from mansard.release.pointer import RollbackPlan, plan_rollback
from mansard.release.target_check import artifact_warnings, later_warnings, target_warnings
from mansard.site import Site

JOURNAL_SECONDS = 0.6
"""A database that gives no answer in this time is down for a rollback: users are moved within a second."""
ATTEMPTS = 5
"""So often a rollback decides anew when somebody else moved the pointer between reading and writing."""

Answers = Callable[[str, int], bool]
"""(model, version) -> whether an engine that the traffic split names answers for it now."""
EndEngine = Callable[[str, int, int | None], list[str]]
"""(model, version left, stable): end the engine of the version left, unless it is stable's too. What hindered it."""
WriteSplit = Callable[[str, Pointers, int], None]
"""(model, pointers, global term): bring the model's part of the split file to these pointers, which name no canary.

Repeatable: where the file says so already, nothing is written. Conflict where the file is newer than `term`.
"""


@dataclass(frozen=True, slots=True)
class Request:
    """What an operator asked for."""

    model: str
    from_version: int | None
    to_version: int | None
    hard: bool
    who: str
    why: str


@dataclass(frozen=True, slots=True)
class Moved:
    """What was decided and where the model stands after it. `artifact` is that of the version moved to, where known."""

    plan: RollbackPlan
    after: Pointers
    warnings: list[str]
    artifact: str | None


def rollback_directly(
    site: Site, request: Request, answers: Answers, write_split: WriteSplit, end_engine: EndEngine
) -> dict[str, Any]:
    """Decision 10 without the host: move the pointer in the journal, then write the split. Safe to repeat.

    Also where nothing is to move, the split is brought to the pointers, because an earlier call may have been killed
    between the two. Raises Conflict (nothing to go back to), BadInput (`to_version`), Corrupt (the target is damaged)
    and MansardError (the target does not answer, and nobody is there to start it); `hard` moves in the last two cases.
    """
    begun = time.perf_counter()
    try:
        moved, journal_trouble = _moved(site, request, answers, write_split)
    except OSError as error:
        raise MansardError(f"{site.home}: {error}; make room, then the same command goes on") from error
    after = moved.after
    milliseconds = round((time.perf_counter() - begun) * 1000, 3)
    warnings = moved.warnings
    if request.hard and moved.plan.action != "nothing":
        warnings = warnings + end_engine(request.model, _known(moved.plan.version), after.stable)
    if moved.artifact is not None:
        warnings = warnings + later_warnings(site, _known(moved.plan.to), moved.artifact)
    return {
        "format": 1,
        "model": request.model,
        "changed": moved.plan.action != "nothing",
        "action": moved.plan.action,
        "stable": after.stable,
        "canary": after.canary,
        "previous": after.previous,
        "term": after.term,
        "message": moved.plan.message,
        "warnings": warnings,
        "host": "down",
        "journal": journal_trouble,
        "milliseconds": milliseconds,
    }


def _moved(site: Site, request: Request, answers: Answers, write_split: WriteSplit) -> tuple[Moved, str]:
    """(what was moved, why the journal was not: empty when it was)."""
    try:
        return with_room(site, lambda: _in_journal(site, request, answers, write_split)), ""
    except (JournalDown, JournalDamaged) as error:
        return with_room(site, lambda: _in_emergency(site, request, answers, write_split)), str(error)


def operator_warnings(site: Site, who: str) -> list[str]:
    """A rollback is never refused for who asked; that the site does not know them as an operator is said."""
    if who in site.people and "operator" in site.people[who].roles:
        return []
    return [f"{who} is not an operator of {site.path.name}; the rollback was made all the same"]


def known_state(site: Site, model: str) -> tuple[Remembered, Memory, list[emergency.Emergency], int]:
    """The model by memory, traffic split and emergency entries; with them the highest term that was seen.

    Raises Corrupt for a damaged emergency file; damaged memory or split count as absent.
    """
    try:
        memory = recall(site)
    except Corrupt:
        memory = Memory()
    known = memory.models.get(model, Remembered())
    term, models = _split(site)
    records = emergency.waiting(site)
    if model in models and not records:
        known = with_split(known, model, models[model], term)
    own = [record for record in records if record.model == model]
    if own:
        moves = (*known.moves, *(record.as_entry() for record in own))
        known = Remembered(Pointers(**own[-1].after), moves, known.artifacts)  # type: ignore[arg-type]
    return known, memory, records, max(term, memory.term)


def _in_journal(site: Site, request: Request, answers: Answers, write_split: WriteSplit) -> Moved:
    with Journal.open(site.journal, limit_seconds=JOURNAL_SECONDS) as journal:
        emergency.import_waiting(site, journal)
        plan, warnings, artifact = _move(site, journal, request, answers)
        after = _write(site, journal, request.model, write_split)
        if plan.action != "nothing":
            try:
                remember(site, journal)
            except OSError as error:  # users are served already; the next rollback only knows less
                warnings.append(f"{site.memory_file} was not written: {error}")
    return Moved(plan, after, warnings, artifact)


def _move(
    site: Site, journal: Journal, request: Request, answers: Answers
) -> tuple[RollbackPlan, list[str], str | None]:
    """Decide and move the pointer; decide anew when somebody else moved it in between. Also the target's artifact."""
    model, facts = request.model, {"host": "down", "hard": request.hard}
    who, why = request.who, request.why or "rollback"
    for attempt in range(1, ATTEMPTS + 1):
        pointers = journal.pointers(model)
        plan = _plan(request, journal.moves(model), pointers)
        warnings: list[str] = []
        artifact: str | None = None
        try:
            if plan.action == "abort":
                journal.abort(model, _known(plan.version), who, why, pointers, facts)
            elif plan.action == "move":
                warnings = target_warnings(site, journal, model, _known(plan.to), request.hard)
                warnings += _answer_warnings(request, _known(plan.to), answers)
                artifact = journal.registration(model, _known(plan.to)).artifact
                journal.rollback(model, _known(plan.to), who, why, pointers, facts)
            if plan.action != "nothing":
                warnings += operator_warnings(site, who)
            break
        except Conflict:
            if attempt == ATTEMPTS:
                raise
    return plan, warnings, artifact


def _in_emergency(site: Site, request: Request, answers: Answers, write_split: WriteSplit) -> Moved:
    with emergency.locked(site), _damage_named(site):
        known, memory, records, floor = known_state(site, request.model)
        plan = _plan(request, known.moves, known.pointers)
        warnings: list[str] = []
        after = known.pointers
        if plan.action == "move":
            warnings = _remembered_warnings(site, request, _known(plan.to), known)
            warnings += _answer_warnings(request, _known(plan.to), answers)
        if plan.action != "nothing":
            seen = (memory.sequence, memory.digest)
            write = functools.partial(emergency.write, site, records, request.model, plan, after, known.moves, floor)
            made = with_room(site, functools.partial(write, seen, request.who, request.why or "rollback"))
            after = Pointers(**made.after)  # type: ignore[arg-type]
            warnings += operator_warnings(site, request.who)
            warnings.append(f"the journal's database is down; the move waits for it in {site.emergency_file}")
        if after.canary is None and (records or plan.action != "nothing"):
            with_room(site, functools.partial(write_split, request.model, after, after.term))
    return Moved(plan, after, warnings, None if plan.to is None else known.artifacts.get(plan.to))


def _plan(request: Request, moves: "list[Entry] | tuple[Entry, ...]", pointers: Pointers) -> RollbackPlan:
    asked = (request.from_version, request.to_version)
    return plan_rollback(moves, request.model, pointers, utc_now(), *asked, uptime_now())


def _write(site: Site, journal: Journal, model: str, write_split: WriteSplit) -> Pointers:
    """Bring the split to the pointers; somebody newer may be writing it too."""
    for attempt in range(1, ATTEMPTS + 1):
        pointers, term = journal.pointers(model), journal.term()
        if pointers.canary is not None:
            break  # a rollout runs, and the split is its controller's
        try:
            with_room(site, functools.partial(write_split, model, pointers, term))
            break
        except Conflict:
            if attempt == ATTEMPTS:
                raise
    return pointers


def _answer_warnings(request: Request, to: int, answers: Answers) -> list[str]:
    if answers(request.model, to):
        return []
    if not request.hard:
        raise MansardError(
            f"{request.model} version {to} has no engine that answers, and the host that would start it is down: "
            "start the host (mansard up) and try again, or move at once, answering 503 until then: --hard"
        )
    return [f"version {to} has no engine that answers; the router answers 503 until mansard up"]


def _remembered_warnings(site: Site, request: Request, to: int, known: Remembered) -> list[str]:
    if to not in known.artifacts:
        return [f"version {to}: this machine does not remember its artifact, so its digests were not checked"]
    return artifact_warnings(site, request.model, to, known.artifacts[to], request.hard)


def _split(site: Site) -> tuple[int, dict[str, Any]]:
    """(term, model -> its part) of the split file; (0, nothing) where it is absent or damaged."""
    try:
        tree = json.loads(site.split_file.read_bytes())
        return int(tree["term"]), dict(tree["models"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0, {}


@contextmanager
def _damage_named(site: Site) -> Iterator[None]:
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{error} (as far as this machine remembers: the journal's database is down)") from error
    except Conflict as error:
        raise Conflict(f"{error} (as far as this machine remembers: the journal's database is down)") from error


def _known(version: int | None) -> int:
    assert version is not None, "a plan that moves or aborts names its version"
    return version
