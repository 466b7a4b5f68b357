"""Candidates and the journal: what they are judged against, and their registration."""

from dataclasses import dataclass

from mansard.errors import Conflict
from mansard.records import Registration, SnapshotId
from mansard.release.approval import is_signed, sign_registration
from mansard.release.journal import Journal
from mansard.site import Site
from tasks import policy


@dataclass(frozen=True, slots=True)
class Standing:
    """What a candidate is judged against, read once: the version in service and the anchor of the guards."""

    stable: int
    stable_artifact: SnapshotId
    anchor: int
    anchor_artifact: SnapshotId


def standing(site: Site, model_name: str, anchor: int) -> Standing:
    """Conflict while nothing is stable; BadInput for an anchor that is not registered."""
    with Journal.open(site.journal) as journal:
        stable = journal.pointers(model_name).stable
        if stable is None:
            raise Conflict(
                f"nothing of {model_name} is stable, so there is nothing to judge against; "
                "adopt, approve and release a base first: mansard adopt SPEC"
            )
        return Standing(
            stable,
            journal.registration(model_name, stable).artifact,
            anchor,
            journal.registration(model_name, anchor).artifact,
        )


def find_recorded(
    site: Site, model_name: str, artifact: SnapshotId, spec_digest: str
) -> tuple[int, Registration] | None:
    """The version that the same spec already made with this artifact, with its newest verdict."""
    with Journal.open(site.journal) as journal:
        version = journal.find(model_name, artifact, spec_digest)
        return None if version is None else (version, journal.registration(model_name, version))


@policy.record
def register(site: Site, registration: Registration) -> int:
    """The version number. Signed by the author's key; an equal registration has its number already."""
    with Journal.open(site.journal) as journal:
        return journal.register(registration, sign_registration(site, registration))


@policy.record
def register_judgement(site: Site, version: int, registration: Registration, why: str) -> None:
    """A version judged again, signed by its author's key; it needs a new approval. A repeat adds nothing, unless the
    author has another key by now."""
    with Journal.open(site.journal) as journal:
        model = registration.model_name
        known = journal.signature(model, version)
        if journal.registration(model, version) != registration or not is_signed(site, registration, known):
            signature = sign_registration(site, registration)
            journal.judge(version, registration, signature, registration.author, why)
