"""What is damaged of a snapshot is dropped, so that its stage makes it again. No torch."""

from mansard.records import SnapshotId
from mansard.store.backend import object_name
from mansard.store.store import Store


def drop_damaged(store: Store, snapshot: SnapshotId) -> list[str]:
    """Remove a snapshot's objects that are not what their digests say, so that they are made again; their files."""
    damages = store.verify(snapshot)
    store.backend.remove([object_name(damage.digest) for damage in damages])
    return sorted({damage.file for damage in damages})
