"""Which branches in service stand on a base that a release leaves: they stay where they are until people move them."""

from dataclasses import dataclass

from mansard.composition.compose import composition_of
from mansard.records import SnapshotId
from mansard.release.journal import Journal
from mansard.release.window import resident_versions
from mansard.site import Site
from mansard.store.store import Store


@dataclass(frozen=True, slots=True)
class BoundBranch:
    """A resident version that is a branch on `base`, an artifact that `new` is not and does not stand on."""

    model: str
    version: int
    is_stable: bool
    base: SnapshotId

    def text(self, new: int) -> str:
        """One line with what to do next."""
        what = "serves on" if self.is_stable else "stays resident"
        return (
            f"{self.model} version {self.version} is a branch on base {self.base[:12]}, which version {new} is not: it "
            f"{what} with that base until you derive it again: mansard customize SPEC (base: version: {new})"
        )


def bound_branches(site: Site, name: str, new: int) -> list[BoundBranch]:
    """Resident branches of every model of the site whose base is not the artifact of version `new` of model `name`."""
    store = Store.of(site)
    found = []
    with Journal.open(site.journal) as journal:
        artifact = journal.registration(name, new).artifact
        under = composition_of(store, artifact)
        base = artifact if under is None else under.base
        for model in site.models:
            pointers = journal.pointers(model)
            for version in resident_versions(journal.moves(model), model, pointers, site.rollback_window):
                made = composition_of(store, journal.registration(model, version).artifact)
                if made is not None and made.base != base:
                    found.append(BoundBranch(model, version, version == pointers.stable, made.base))
    return found
