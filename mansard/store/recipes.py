"""What recipes made, and how: one record a recipe, and beside each snapshot the lineage records of its recipes."""

import json
from collections.abc import Mapping
from typing import Any

from mansard.canonical import canonical_json
from mansard.errors import Corrupt, MansardError
from mansard.records import SnapshotId
from mansard.store.backend import Backend

FORMAT = 1
LINEAGE = "lineage"


class Recipes:
    """The records of a backend."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def snapshot_of(self, recipe: str) -> SnapshotId | None:
        """What the recipe made the last time; None where that is not remembered."""
        record = read_record(self._backend, recipe_name(recipe))
        return None if record is None else str(record["snapshot"])

    def remember(self, recipe: str, snapshot: SnapshotId, lineage: Mapping[str, Any]) -> None:
        write_record(self._backend, f"{LINEAGE}/{snapshot}/{checked_name(recipe)}.json", lineage)
        write_record(self._backend, recipe_name(recipe), {"snapshot": snapshot})

    def lineage(self, snapshot: SnapshotId) -> list[dict[str, Any]]:
        """The records of every recipe that made the snapshot, oldest first where they say `begun_at`."""
        names = [listed.name for listed in self._backend.listed(f"{LINEAGE}/{checked_name(snapshot)}")]
        records = [read_record(self._backend, name) for name in names]
        return sorted((r for r in records if r is not None), key=lambda r: str(r.get("begun_at", "")))


def recipe_name(recipe: str) -> str:
    return f"recipes/{checked_name(recipe)}.json"


def read_record(backend: Backend, name: str) -> dict[str, Any] | None:
    """A record; None where it is absent, Corrupt where it is no JSON, MansardError where its format is another."""
    data = backend.read(name)
    if data is None:
        return None
    try:
        record: dict[str, Any] = json.loads(data)
    except ValueError as error:
        raise Corrupt(f"{backend.url}/{name}: damaged ({error}); remove it and run again") from error
    if record.get("format") != FORMAT:
        found = record.get("format")
        raise MansardError(
            f"{backend.url}/{name}: format {found!r}; this Mansard reads format {FORMAT}: use a newer one"
        )
    return record


def write_record(backend: Backend, name: str, record: Mapping[str, Any]) -> None:
    backend.write(name, canonical_json({"format": FORMAT, **record}))


def checked_name(name: str) -> str:
    assert name and "/" not in name and not name.startswith("."), f"bad name {name!r}"
    return name
