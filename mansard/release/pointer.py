"""The rules of the pointers (design decision 10), as pure functions over journal entries.

Entries are in the order of the journal and may hold other models' and other kinds'. Nothing here reads or writes.

"Earlier" in "the newest earlier stable" is read strictly: promoted before the present stable was. So after
`rollback --to 1` from 3, with 2 in between, no plain rollback leads forward to 2 again; `--to 2` does.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Literal

from mansard.errors import BadInput, Conflict
from mansard.release.events import (
    ABORTED,
    APPROVED,
    CANARY_STEP,
    EMERGENCY,
    JUDGED,
    MOVES,
    PROMOTED,
    REJECTED,
    ROLLED_BACK,
    ROLLOUT_STARTED,
    Entry,
    Pointers,
    Uptime,
    as_moment,
)

RECENT = timedelta(minutes=10)
"""Within this time after a rollback or an abort, a second operator's plain `rollback` changes nothing."""


@dataclass(frozen=True, slots=True)
class RollbackPlan:
    """What `rollback` shall do. `move`: stable goes from `version` to `to`; `abort`: the rollout of `version` ends."""

    action: Literal["nothing", "abort", "move"]
    message: str
    version: int | None = None
    to: int | None = None


def previous_of(entries: Iterable[Entry], model: str) -> int | None:
    """The newest earlier stable whose newest promotion was not followed by its rollback."""
    stable: int | None = None
    promoted: dict[int, int] = {}
    left: dict[int, int] = {}
    for entry in _of(entries, model, (PROMOTED, ROLLED_BACK)):
        version = _version(entry)
        if entry.kind == PROMOTED:
            promoted[version], stable = entry.sequence, version
        else:
            left[version], stable = entry.sequence, int(entry.body["to"])
    if stable is None:
        return None
    earlier = {v: at for v, at in promoted.items() if at < promoted[stable] and left.get(v, 0) < at}
    return max(earlier, key=lambda version: earlier[version], default=None)


def once_stable(entries: Iterable[Entry], model: str) -> list[int]:
    """Versions that were promoted at least once, the newest promotion first."""
    newest = {_version(e): e.sequence for e in _of(entries, model, (PROMOTED,))}
    return sorted(newest, key=lambda version: -newest[version])


def rollback_target(entries: Sequence[Entry], model: str, to: int | None = None) -> int:
    """Where stable goes: `previous`, or `to` where it was once stable. Conflict with nothing to go back to."""
    known = once_stable(entries, model)
    if to is not None:
        if to not in known:
            listed = ", ".join(map(str, known)) or "none"
            raise BadInput(
                f"{model} version {to} was never stable, and --to goes only to one that was ({listed}); "
                f"a new one comes by: mansard release {to}"
            )
        return to
    previous = previous_of(entries, model)
    if previous is None:
        others = [str(v) for v in known if v != stable_of(entries, model)]
        hint = f"; once stable and left: {', '.join(others)}; name one with --to" if others else ""
        raise Conflict(f"{model}: nothing to go back to: no earlier stable is left{hint}")
    return previous


def stable_of(entries: Iterable[Entry], model: str) -> int | None:
    """The stable version by the entries alone."""
    stable: int | None = None
    for entry in _of(entries, model, (PROMOTED, ROLLED_BACK)):
        stable = _version(entry) if entry.kind == PROMOTED else int(entry.body["to"])
    return stable


def last_move(entries: Iterable[Entry], model: str) -> Entry | None:
    moves = _of(entries, model, MOVES)
    return moves[-1] if moves else None


def recent_move(
    entries: Iterable[Entry], model: str, now: datetime, uptime: Uptime | None = None
) -> Entry | None:
    """The last move, when it was a rollback or an abort less than ten minutes ago.

    By the seconds since the boot where the entry is of this boot, because clocks jump; else by the clock, either way.
    """
    last = last_move(entries, model)
    if last is None or last.kind not in (ROLLED_BACK, ABORTED):
        return None
    then = last.body.get("uptime")
    if uptime is not None and isinstance(then, dict) and then.get("boot") == uptime.boot:
        age = timedelta(seconds=uptime.seconds - float(then["seconds"]))
    else:
        age = abs(now - as_moment(last.at))
    return last if age < RECENT else None


def plan_rollback(
    entries: Sequence[Entry],
    model: str,
    pointers: Pointers,
    now: datetime,
    from_version: int | None = None,
    to_version: int | None = None,
    uptime: Uptime | None = None,
) -> RollbackPlan:
    """All of decision 10's rules in their order. Raises Conflict (nothing to go back to) or BadInput (`to_version`)."""
    stable, canary = pointers.stable, pointers.canary
    if from_version is not None and from_version not in (stable, canary):
        return RollbackPlan("nothing", f"{model}: nothing changed: version {from_version} is not stable, {stable} is")
    recent = None if from_version is not None else recent_move(entries, model, now, uptime)
    if recent is not None:
        return RollbackPlan("nothing", _recently(recent, model, pointers, to_version))
    if canary is not None:
        return RollbackPlan("abort", _aborting(model, pointers, from_version, to_version), version=canary)
    target = rollback_target(entries, model, to_version)
    if target == stable:
        return RollbackPlan("nothing", f"{model}: nothing changed: version {target} is stable already")
    return RollbackPlan("move", f"{model}: version {target} is stable again, was {stable}", version=stable, to=target)


def needs_new_approval(entries: Iterable[Entry], model: str, version: int) -> bool:
    """Whether no approval of `version` is later than its last abort or rollback (by order, not by clocks)."""
    approved = retreated = 0
    for entry in _of(entries, model, (APPROVED, ABORTED, ROLLED_BACK)):
        if entry.version == version:
            if entry.kind == APPROVED:
                approved = entry.sequence
            else:
                retreated = entry.sequence
    return approved <= retreated


def approvals_in_force(entries: Iterable[Entry], model: str, version: int) -> list[Entry]:
    """Approvals of a version that no later rejection, judgement, abort or rollback of it stands against, by order."""
    standing: list[Entry] = []
    for entry in _of(entries, model, (APPROVED, REJECTED, JUDGED, ABORTED, ROLLED_BACK)):
        if entry.version == version:
            standing = [*standing, entry] if entry.kind == APPROVED else []
    return standing


def after_move(earlier: Sequence[Entry], new: Entry, before: Pointers, term: int) -> Pointers:
    """The pointers after the move `new`, whose body holds `version` (and `to`); Conflict where it may not happen."""
    model, version = new.model, _version(new)
    if new.kind == ROLLOUT_STARTED:
        if before.canary is not None:
            raise Conflict(
                f"{model}: a rollout of version {before.canary} runs; one at a time: wait for it or mansard rollback"
            )
        if before.stable == version:
            raise Conflict(f"{model}: version {version} is stable already; nothing to release")
        return replace(before, canary=version, term=term)
    if new.kind == ROLLED_BACK:
        if before.canary is not None:
            raise Conflict(f"{model}: a rollout of version {before.canary} runs; rollback aborts it and moves nothing")
        if before.stable != version or new.body["to"] == version:
            raise Conflict(f"{model}: stable is {before.stable}; it cannot go from {version} to {new.body['to']}")
        return Pointers(int(new.body["to"]), None, previous_of([*earlier, new], model), term)
    if new.kind == EMERGENCY:
        return replace(before, term=term)
    if before.canary != version:
        raise Conflict(f"{model}: no rollout of version {version} runs (canary is {before.canary}): {new.kind} refused")
    if new.kind == CANARY_STEP:
        return replace(before, term=term)
    if new.kind == ABORTED:
        return replace(before, canary=None, term=term)
    assert new.kind == PROMOTED, new.kind
    return Pointers(version, None, previous_of([*earlier, new], model), term)


def _of(entries: Iterable[Entry], model: str, kinds: Sequence[str]) -> list[Entry]:
    return [e for e in entries if e.model == model and e.kind in kinds]


def _version(entry: Entry) -> int:
    version = entry.version
    assert version is not None, f"journal entry {entry.sequence} ({entry.kind}) names no version"
    return version


def _aborting(model: str, pointers: Pointers, from_version: int | None, to_version: int | None) -> str:
    if pointers.stable is None:
        return f"{model}: rollout of version {pointers.canary} aborted; nothing is stable yet"
    done = f"{model}: rollout of version {pointers.canary} aborted; stable stays {pointers.stable}"
    if from_version == pointers.stable or to_version not in (None, pointers.stable):
        to = f" --to {to_version}" if to_version is not None else ""
        done += f"; to leave that too: mansard rollback --from {pointers.stable}{to}"
    return done


def _recently(recent: Entry, model: str, pointers: Pointers, to_version: int | None) -> str:
    did = (
        f"rolled back from {recent.version} to {recent.body['to']}"
        if recent.kind == ROLLED_BACK
        else f"aborted the rollout of {recent.version}"
    )
    to = f" --to {to_version}" if to_version is not None else ""
    return (
        f"{model}: nothing changed: {recent.who} {did} at {recent.at}, less than ten minutes ago; stable is "
        f"{pointers.stable}; to leave it as well: mansard rollback --from {pointers.stable}{to}"
    )
