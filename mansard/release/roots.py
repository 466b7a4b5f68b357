"""What the versions of a journal need of the store: the roots of `collect`.

A version's roots are all that its registrations name (model, artifact, verdict record, fingerprint, item records, what
each stage made) and, along the lineage records, all that led there: `why` walks down to the base's digest and the
data, `gate` judges again on the same suites, a later upgrade builds on the model. Versions of every verdict count, for
a failed candidate is evidence.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mansard.records import SnapshotId
from mansard.release.events import EVIDENCE
from mansard.release.journal import Journal
from mansard.store.snapshot import is_digest

if TYPE_CHECKING:
    from mansard.store.store import Store


def version_roots(journal: Journal, store: "Store") -> set[SnapshotId]:
    """Snapshots of all versions of all models, and what they were derived from.

    Raises Corrupt or MansardError where a lineage record cannot be read: nothing may go on a guess.
    """
    found: set[SnapshotId] = set()
    waiting = [
        snapshot
        for entry in journal.entries(kinds=EVIDENCE)
        for snapshot in _named(entry.body["registration"])
    ]
    while waiting:
        snapshot = waiting.pop()
        if snapshot not in found:
            found.add(snapshot)
            waiting += [taken for record in store.lineage(snapshot) for taken in record.get("inputs", {}).values()]
    return found


def _named(value: Any) -> Iterator[SnapshotId]:  # noqa: ANN401 - any JSON value
    """Every digest in it, whatever field holds it: one that a later record adds is kept without a word here."""
    if isinstance(value, str) and is_digest(value):
        yield value
    elif isinstance(value, dict):
        yield from _named(list(value.values()))
    elif isinstance(value, list):
        for each in value:
            yield from _named(each)
