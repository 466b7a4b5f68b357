"""Candidates and the journal: what they are judged against, how many tries there were, their registration."""

from dataclasses import dataclass

from mansard.errors import Conflict
from mansard.records import Registration, SnapshotId
from mansard.release.approval import sign_registration
from mansard.release.events import EVIDENCE, PROMOTED, REGISTERED
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


def count_attempts(site: Site, model_name: str, artifact: SnapshotId, suites: tuple[str, ...]) -> int:
    """This candidate's number among those evaluated on any of the suites since the last promotion; 1 is the first."""
    others: set[SnapshotId] = set()
    with Journal.open(site.journal) as journal:
        for entry in journal.entries(model_name, kinds=(*EVIDENCE, PROMOTED)):
            if entry.kind == PROMOTED:
                others.clear()
            elif entry.kind == REGISTERED:
                found = Registration.from_json(entry.body["registration"])
                if found.artifact != artifact and {name for name, _ in found.item_records} & set(suites):
                    others.add(found.artifact)
    return 1 + len(others)


def find_recorded(
    site: Site, model_name: str, artifact: SnapshotId, spec_digest: str
) -> tuple[int, Registration] | None:
    """The version that the same spec already made with this artifact, with its newest verdict."""
    with Journal.open(site.journal) as journal:
        version = journal.find(model_name, artifact, spec_digest)
        return None if version is None else (version, journal.registration(model_name, version))


def read_registration(site: Site, model_name: str, version: int) -> Registration:
    """The newest registration of a version; BadInput for an unknown one."""
    with Journal.open(site.journal) as journal:
        return journal.registration(model_name, version)


@policy.record
def register(site: Site, registration: Registration) -> int:
    """The version number. Signed by the author's key; an equal registration has its number already."""
    with Journal.open(site.journal) as journal:
        return journal.register(registration, sign_registration(site, registration))


@policy.record
def register_judgement(site: Site, version: int, registration: Registration, why: str) -> None:
    """A version judged again, signed by its author's key; it needs a new approval. A repeat adds nothing."""
    with Journal.open(site.journal) as journal:
        if journal.registration(registration.model_name, version) != registration:
            signature = sign_registration(site, registration)
            journal.judge(version, registration, signature, registration.author, why)
