"""What the versions of a journal need of the store: the roots of `collect`.

A version's roots are all that its registrations name (model, artifact, verdict record, fingerprint, item records, what
each stage made) and, along the lineage records, all that led there: `why` walks down to the base's digest and the
data, `gate` judges again on the same suites, a later upgrade builds on the model. Versions of every verdict count, for
a failed candidate is evidence.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mansard.records import Registration, SnapshotId
from mansard.release.events import EVIDENCE
from mansard.release.journal import Journal

if TYPE_CHECKING:
    from mansard.store import Store


def version_roots(journal: Journal, store: "Store") -> set[SnapshotId]:
    """Snapshots of all versions of all models, and what they were derived from.

    Raises Corrupt or MansardError where a lineage record cannot be read: nothing may go on a guess.
    """
    found: set[SnapshotId] = set()
    waiting = [
        snapshot
        for entry in journal.entries(kinds=EVIDENCE)
        for snapshot in _named(Registration.from_json(entry.body["registration"]))
    ]
    while waiting:
        snapshot = waiting.pop()
        if snapshot not in found:
            found.add(snapshot)
            waiting += [taken for record in store.lineage(snapshot) for taken in record.get("inputs", {}).values()]
    return found


def _named(registration: Registration) -> Iterator[SnapshotId]:
    yield from (registration.model, registration.artifact, registration.verdict_record, registration.fingerprint)
    yield from (snapshot for _, snapshot in registration.item_records)
    yield from (snapshot for _, _, snapshot in registration.stages)
