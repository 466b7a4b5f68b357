"""Damage: what in a store is not what its digest says, and what to remove so that it can be made again."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mansard.records import SnapshotId
from mansard.store.objects import Objects
from mansard.store.snapshot import Manifest

MANIFEST_DAMAGED = "its manifest does not match its digest"

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass(frozen=True, slots=True)
class Damage:
    """An object (or manifest) that is not what its digest says. `snapshot` and `file` are empty where none uses it."""

    snapshot: SnapshotId
    file: str
    tensor: str | None
    digest: str
    what: str

    def __str__(self) -> str:
        """One line, with the file to remove so that taking or deriving the content again brings it back."""
        place = f"snapshot {self.snapshot}" if self.snapshot else "used by no snapshot"
        file = f": {self.file}" if self.file else ""
        tensor = f": tensor {self.tensor}" if self.tensor else ""
        folder = "manifests" if self.what == MANIFEST_DAMAGED else f"objects/{self.digest[:2]}"
        remedy = f"remove {folder}/{self.digest}, then take or derive it again"
        return f"{place}{file}{tensor}: {self.what}; {remedy}"


def find_damage(
    objects: Objects, manifests: Mapping[SnapshotId, Manifest | None], with_unused: bool, progress: Progress | None
) -> list[Damage]:
    """Hash what the manifests name (None: a damaged one), and on request what no snapshot uses; each object once."""
    damages: list[Damage] = []
    uses: dict[str, list[tuple[SnapshotId, str, str | None, int | None]]] = {}
    for snapshot, manifest in manifests.items():
        if manifest is None:
            damages.append(Damage(snapshot, "", None, snapshot, MANIFEST_DAMAGED))
            continue
        for path, tensor, digest, size_bytes in manifest.objects():
            uses.setdefault(digest, []).append((snapshot, path, tensor, size_bytes))
    if with_unused:
        for digest in objects.digests():
            uses.setdefault(digest, [("", "", None, None)])
    for digest, what in objects.check({d: u[0][3] for d, u in uses.items()}, progress):
        damages += [Damage(snapshot, path, tensor, digest, what) for snapshot, path, tensor, _ in uses[digest]]
    return sorted(damages, key=lambda d: (d.snapshot, d.file, d.tensor or ""))
