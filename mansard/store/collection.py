"""Collecting: what no root needs leaves the store, and its room is free again.

Kept are the snapshots of the roots (versions with all that led to them: mansard/release/roots.py), pinned ones, those
used within the grace period, and whatever was used since the oldest lease of work under way began; and every object
that one of them names or that was itself used that lately (an upload that is not listed yet). What may go is found
while others write; the deleting phase shuts them out, reads roots, pins and leases again and deletes only what still
may go: snapshots first, so that one that is listed has all its objects wherever a kill falls.
Not covered: unfinished work (`work`, checkpoints of a stage that was killed) is never removed, only counted.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mansard.errors import MansardError
from mansard.records import SnapshotId
from mansard.store.backend import OBJECTS, Listed, object_name
from mansard.store.recipes import LINEAGE, read_record, recipe_name
from mansard.store.store import MANIFESTS, Store

GRACE_SECONDS = 24 * 3600.0
"""A day: what somebody took by hand in the morning is there for a spec in the evening."""
WAIT_SECONDS = 600.0
CLOCK_SECONDS = 1.0
"""Times on some file systems are whole seconds."""

Roots = Callable[[], Collection[SnapshotId]]
ObjectsOf = Callable[[SnapshotId], frozenset[str]]


@dataclass(frozen=True, slots=True)
class Content:
    """What a store holds at one moment. `rooted` and `pinned` may name snapshots that are not there."""

    snapshots: Sequence[Listed]
    objects: Sequence[Listed]
    lineage: Sequence[Listed]
    rooted: frozenset[SnapshotId]
    pinned: frozenset[SnapshotId]


@dataclass(frozen=True, slots=True)
class Plan:
    """What goes, and the room it takes. `lineage` are names; `kept` counts snapshots by their first reason to stay."""

    snapshots: tuple[SnapshotId, ...]
    objects: tuple[Listed, ...]
    lineage: tuple[str, ...]
    room_bytes: int
    kept: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Collected:
    """What went, or would go. `freed_bytes` is the room that this gave (trees and what dead writers left with it) or
    would give at least."""

    snapshots: tuple[SnapshotId, ...]
    num_objects: int
    freed_bytes: int
    kept: Mapping[str, int]
    unfinished_bytes: int


def plan(content: Content, oldest_seconds: float, objects_of: ObjectsOf) -> Plan:
    """Pure. What was used at `oldest_seconds` (of the epoch) or later stays."""
    kept: set[SnapshotId] = set()
    counts = {"versions": 0, "pins": 0, "recent": 0}
    gone: list[Listed] = []
    for listed in content.snapshots:
        snapshot = _last(listed)
        reasons = {
            "versions": snapshot in content.rooted,
            "pins": snapshot in content.pinned,
            "recent": listed.used_at >= oldest_seconds,
        }
        reason = next((name for name, holds in reasons.items() if holds), None)
        if reason is None:
            gone.append(listed)
        else:
            kept.add(snapshot)
            counts[reason] += 1
    named = {object_name(digest) for snapshot in kept for digest in objects_of(snapshot)}
    objects = tuple(o for o in content.objects if o.name not in named and o.used_at < oldest_seconds)
    stays = kept | content.rooted | content.pinned
    lineage = tuple(
        r for r in content.lineage if r.used_at < oldest_seconds and r.name.split("/")[1] not in stays
    )
    room_bytes = sum(listed.room_bytes for listed in (*gone, *objects, *lineage))
    ids, names = (tuple(_last(listed) for listed in gone)), tuple(listed.name for listed in lineage)
    return Plan(ids, objects, names, room_bytes, counts)


def collect(
    store: Store,
    roots: Roots,
    grace_seconds: float = GRACE_SECONDS,
    wait_seconds: float = WAIT_SECONDS,
    clock: Callable[[], float] = time.time,
) -> Collected:
    """Delete what nothing needs. MansardError where others used the store all the time; Corrupt where a manifest that
    stays is damaged, for then nobody knows what it needs. `roots` is called again while everybody is shut out."""
    memory = _Memory(store)
    _planned(store, roots, memory, grace_seconds, clock)  # reads the manifests while nobody waits for it
    with store.deleting(wait_seconds) as is_ours:
        if not is_ours:
            raise MansardError(
                f"{store.backend.url}: others wrote or laid out trees for all of {wait_seconds:.0f} s; nothing was "
                "removed: run again when less is going on"
            )
        found = _planned(store, roots, memory, grace_seconds, clock)
        return _apply(store, found)


def preview(
    store: Store, roots: Roots, grace_seconds: float = GRACE_SECONDS, clock: Callable[[], float] = time.time
) -> Collected:
    """What `collect` would delete now; changes nothing."""
    found = _planned(store, roots, _Memory(store), grace_seconds, clock)
    return Collected(found.snapshots, len(found.objects), found.room_bytes, found.kept, _unfinished_bytes(store))


class _Memory:
    """The objects of snapshots, each manifest read once: they never change."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[SnapshotId, frozenset[str]] = {}

    def objects_of(self, snapshot: SnapshotId) -> frozenset[str]:
        if snapshot not in self._known:
            manifest = self._store.manifest(snapshot)
            self._known[snapshot] = frozenset(digest for _, _, digest, _ in manifest.objects())
        return self._known[snapshot]


def _planned(
    store: Store, roots: Roots, memory: _Memory, grace_seconds: float, clock: Callable[[], float]
) -> Plan:
    oldest = min([clock() - grace_seconds, *store.leases.begun()]) - CLOCK_SECONDS
    backend = store.backend
    content = Content(
        tuple(backend.listed(MANIFESTS)),
        tuple(backend.listed(OBJECTS)),
        tuple(backend.listed(LINEAGE)),
        frozenset(roots()),
        frozenset(store.pins()),
    )
    return plan(content, oldest, memory.objects_of)


def _apply(store: Store, found: Plan) -> Collected:
    """Only while everybody else is shut out."""
    backend = store.backend
    manifests = [f"{MANIFESTS}/{snapshot}" for snapshot in found.snapshots]
    freed_bytes = backend.remove(manifests)
    backend.settle(manifests)  # lasts before the first object goes
    freed_bytes += backend.remove([*_stale_recipes(store, found.lineage), *found.lineage])
    freed_bytes += backend.remove([o.name for o in found.objects]) + backend.sweep()
    freed_bytes += store.trees.sweep(set(store.snapshots()))
    store.leases.sweep()
    return Collected(found.snapshots, len(found.objects), freed_bytes, found.kept, _unfinished_bytes(store))


def _stale_recipes(store: Store, lineage: Sequence[str]) -> Iterator[str]:
    """The recipe records that still name the snapshot of a lineage record that goes."""
    for name in lineage:
        _, snapshot, recipe = name.split("/")
        record = read_record(store.backend, recipe_name(recipe.removesuffix(".json")))
        if record is not None and record["snapshot"] == snapshot:
            yield recipe_name(recipe.removesuffix(".json"))


def _unfinished_bytes(store: Store) -> int:
    return sum(listed.room_bytes for listed in store.scratch())


def _last(listed: Listed) -> str:
    return listed.name.rpartition("/")[2]
