"""Outages of stable's engine, as pure rules over journal entries. Nothing here reads or writes.

`stable_down` says that the engine of stable ended and which version serves its users meanwhile (`to`, or null for
nobody); a second one says that this changed, or why stable is not back yet. `stable_up` ends it, and so does any entry
that makes another version stable. No pointer moves, so neither takes a term: the traffic split names the version that
stands in, and its lease counter orders the two.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mansard.errors import Conflict
from mansard.release.events import (
    DECISIONS,
    PROMOTED,
    REJECTED,
    ROLLED_BACK,
    STABLE_DOWN,
    STABLE_UP,
    Entry,
    Pointers,
)
from mansard.release.window import resident_versions


@dataclass(frozen=True, slots=True)
class Outage:
    """`version` is stable by the pointers, `to` serves its users (None: nobody); `first` and `last` are its entries."""

    version: int
    to: int | None
    first: Entry
    last: Entry


def open_outage(entries: Iterable[Entry], model: str) -> Outage | None:
    """The outage that no later entry ended."""
    outage: Outage | None = None
    for entry in entries:
        if entry.model != model:
            continue
        if entry.kind == STABLE_DOWN:
            version = entry.version
            assert version is not None, f"journal entry {entry.sequence} names no version"
            is_new = outage is None or outage.version != version
            outage = Outage(version, entry.body["to"], entry if is_new or outage is None else outage.first, entry)
        elif entry.kind in (STABLE_UP, PROMOTED, ROLLED_BACK):
            outage = None
    return outage


def check_outage(entries: Sequence[Entry], new: Entry, before: Pointers) -> None:
    """Conflict where the entry `new` (stable_down or stable_up) cannot follow `entries` and the pointers."""
    model, version = new.model, new.version
    if before.stable != version:
        raise Conflict(f"{model}: stable is {before.stable}, not {version}: {new.kind} refused; look at mansard status")
    if new.kind == STABLE_UP and open_outage(entries, model) is None:
        raise Conflict(f"{model}: version {version} is not down by the journal: {new.kind} refused")
    if new.kind == STABLE_DOWN and new.body["to"] is not None and new.body["to"] in (version, before.canary):
        raise Conflict(f"{model}: version {new.body['to']} is stable or canary and cannot stand in for {version}")


def stand_ins(moves: Sequence[Entry], model: str, pointers: Pointers, rollback_window: int) -> list[int]:
    """The versions that may serve the users of a dead stable, best first: `previous`, then further earlier stables that
    were not rolled back; none whose newest decision is a rejection."""
    decisions = {e.version: e.kind for e in moves if e.model == model and e.kind in DECISIONS}
    resident = resident_versions(moves, model, pointers, rollback_window)
    roles = (pointers.stable, pointers.canary)
    return [v for v in resident if v not in roles and decisions.get(v) != REJECTED]


def outage_text(kind: str, body: Mapping[str, Any]) -> str:
    """What an entry of an outage says, in a few words."""
    stable = f"version {body['version']} (stable)"
    if kind == STABLE_UP:
        return f"{stable} serves its users again"
    served_by = "nobody serves its users" if body["to"] is None else f"version {body['to']} serves its users"
    return f"{stable} is down; {served_by}"


def next_command(version: int, to: int | None, target: int | None) -> str:
    """The command that the on-call most likely needs during an outage; `target` is where a rollback would go."""
    if target is None:
        return "mansard up   (the host starts it again and again; nothing earlier is left to roll back to)"
    if to is None:
        return f"mansard rollback --from {version}   (version {target} is started if need be)"
    return f"mansard rollback --from {version}   (only to leave it for good; it serves again once it is up and right)"


def outage_intervals(entries: Iterable[Entry], model: str, version: int, boot: str) -> list[tuple[float, float]]:
    """When `version` was down as stable: seconds since the boot, from and to; an open one ends at infinity.

    One that began before this boot lasts from the beginning of time; one that ended before it is left out, because no
    clock of this boot tells when that was.
    """
    intervals: list[tuple[float, float]] = []
    begin: float | None = None
    for entry in entries:
        if entry.model != model or entry.kind not in (STABLE_DOWN, STABLE_UP, PROMOTED, ROLLED_BACK):
            continue
        moment = _seconds(entry, boot)
        if entry.kind == STABLE_DOWN:
            if begin is None and entry.version == version:
                begin = -math.inf if moment is None else moment
        elif begin is not None:
            if moment is not None:
                intervals.append((begin, moment))
            begin = None
    return [*intervals, (begin, math.inf)] if begin is not None else intervals


def _seconds(entry: Entry, boot: str) -> float | None:
    uptime = entry.body.get("since") or entry.body.get("uptime")
    if not isinstance(uptime, dict) or uptime.get("boot") != boot:
        return None
    return float(uptime["seconds"])
