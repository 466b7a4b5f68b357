"""Approvals: records signed by people, for exactly one artifact, one verdict record, one baseline, one people section.

Guarantees: nobody approves their own upgrade, by name or by key; no failed or unknown verdict is approved; an
approval holds only while nothing that it names has changed, no later rejection, abort or rollback stands against it,
and its signature is of a key that the site still knows. Not covered: expiry, several approvals, a signed tip.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mansard.errors import BadInput, Conflict, Corrupt, NotAllowed
from mansard.records import Registration, SnapshotId
from mansard.release import keys
from mansard.release.events import (
    ABORTED,
    APPROVED,
    DECISIONS,
    PEOPLE_CHANGED,
    REJECTED,
    ROLLED_BACK,
    Entry,
    as_text,
    utc_now,
)
from mansard.release.journal import Journal
from mansard.release.pointer import needs_new_approval
from mansard.site import Site

if TYPE_CHECKING:
    from mansard.store import Store


@dataclass(frozen=True, slots=True)
class Approval:
    """A person's decision, approve or reject. `seen_*` name the journal's newest entry when it was signed."""

    format: int
    model: str
    version: int
    artifact: SnapshotId
    verdict_record: SnapshotId
    baseline_version: int | None
    people_digest: str
    who: str
    at: str
    reason: str
    decision: str
    seen_sequence: int
    seen_digest: str

    def payload(self) -> dict[str, Any]:
        """What is signed; `record` keeps it apart from every other kind of signature."""
        return {"record": "approval", **asdict(self)}


def sign_registration(site: Site, registration: Registration) -> str:
    """The author's signature. NotAllowed unless the author has the role and their private key is here."""
    keys.require_person(site, registration.author, "author")
    return keys.sign(registration.author, site, _registration_payload(registration))


def check_registration(site: Site, registration: Registration, signature: str | None) -> None:
    """NotAllowed unless the author, whom the site still knows as one, signed exactly this registration."""
    author = registration.author
    keys.require_person(site, author, "author")
    if signature is None or not keys.verify(site.public_key(author), _registration_payload(registration), signature):
        raise NotAllowed(f"the registration of {registration.model_name} is not signed by its author {author}'s key")


def approve(
    site: Site, journal: Journal, store: "Store", model: str, version: int, who: str, reason: str
) -> Approval:
    """Sign and record that `version` may be released. Nothing is recorded unless every rule of this module holds.

    Raises BadInput (unknown version, empty reason), NotAllowed, Corrupt (evidence changed), Conflict (baseline moved).
    """
    registration, signature = _registered(journal, model, version)
    _check_reviewer(site, registration, version, who, reason)
    _check_verdict(registration, version)
    _check_baseline(journal, registration, version)
    check_registration(site, registration, signature)
    check_evidence(store, registration)
    return _record(site, journal, registration, version, who, reason, "approve")


def reject(site: Site, journal: Journal, model: str, version: int, who: str, reason: str) -> Approval:
    """Sign and record that `version` may not be released; any approval before it is void."""
    registration, _ = _registered(journal, model, version)
    _check_reviewer(site, registration, version, who, reason)
    return _record(site, journal, registration, version, who, reason, "reject")


def check_approval(site: Site, journal: Journal, model: str, version: int) -> Approval:
    """The approval under which `version` may be released now. Raises NotAllowed, or Conflict for a moved baseline."""
    registration, signature = _registered(journal, model, version)
    decisions = [e for e in journal.entries(model, kinds=DECISIONS) if e.version == version]
    if not decisions:
        raise NotAllowed(f"{model} version {version} is not approved; next: {_next(version)}")
    newest = decisions[-1]
    if newest.kind == REJECTED:
        raise NotAllowed(f"{model} version {version} was rejected by {newest.who} at {newest.at}: {newest.why}")
    _check_not_retreated(journal, model, version)
    approval = _read_approval(newest, f"{model} version {version}")
    _check_signature(site, approval, newest, registration)
    _check_position(journal, approval, newest)
    if (approval.artifact, approval.verdict_record) != (registration.artifact, registration.verdict_record):
        raise NotAllowed(f"{model} version {version} was judged again after its approval; next: {_next(version)}")
    if approval.people_digest != site.people_digest():
        raise NotAllowed(
            f"{model} version {version}: the people of {site.path} changed since it was approved at {approval.at}; "
            f"next: {_next(version)}"
        )
    _check_verdict(registration, version)
    check_registration(site, registration, signature)
    stable = journal.pointers(model).stable
    if stable != approval.baseline_version or approval.baseline_version != registration.baseline_version:
        raise _baseline_moved(model, version, stable, approval.baseline_version)
    return approval


def check_evidence(store: "Store", registration: Registration) -> None:
    """Corrupt unless artifact and verdict record are whole: manifests, and every byte that they name."""
    for what, snapshot in (("artifact", registration.artifact), ("verdict record", registration.verdict_record)):
        if not store.holds(snapshot):
            raise Corrupt(f"{what} {snapshot[:12]} of {registration.model_name} is not whole in {store.root}")
        damages = store.verify(snapshot)
        if damages:
            raise Corrupt(f"{what} {snapshot[:12]} of {registration.model_name} changed in the store: {damages[0]}")


def record_people(site: Site, journal: Journal, who: str) -> None:
    """Journal the people section when it is not the one recorded last."""
    digest = site.people_digest()
    known = journal.entries(kinds=(PEOPLE_CHANGED,))
    if not known or known[-1].body["people_digest"] != digest:
        people = {n: {"roles": list(p.roles), "key": site.public_key(n).hex()} for n, p in site.people.items()}
        journal.append("", PEOPLE_CHANGED, who, str(site.path.name), {"people_digest": digest, "people": people})


def _record(
    site: Site, journal: Journal, registration: Registration, version: int, who: str, reason: str, decision: str
) -> Approval:
    tip = journal.tip()
    assert tip is not None, "there is a registration"
    approval = Approval(
        format=1,
        model=registration.model_name,
        version=version,
        artifact=registration.artifact,
        verdict_record=registration.verdict_record,
        baseline_version=registration.baseline_version,
        people_digest=site.people_digest(),
        who=who,
        at=as_text(utc_now()),
        reason=reason.strip(),
        decision=decision,
        seen_sequence=tip.sequence,
        seen_digest=tip.digest,
    )
    body = {"version": version, "approval": asdict(approval), "signature": keys.sign(who, site, approval.payload())}
    record_people(site, journal, who)
    kind = APPROVED if decision == "approve" else REJECTED
    journal.append(approval.model, kind, who, approval.reason, body)
    return approval


def _registered(journal: Journal, model: str, version: int) -> tuple[Registration, str | None]:
    entry = journal.evidence(model, version)
    return Registration.from_json(entry.body["registration"]), entry.body["signature"]


def _registration_payload(registration: Registration) -> dict[str, Any]:
    return {"record": "registration", "format": 1, **registration.as_json()}


def _check_reviewer(site: Site, registration: Registration, version: int, who: str, reason: str) -> None:
    if not reason.strip():
        raise BadInput("--reason is empty; say in a sentence why, the next reader has only that")
    keys.require_person(site, who, "reviewer")
    author = registration.author
    if who == author or (author in site.people and site.public_key(who) == site.public_key(author)):
        raise NotAllowed(
            f"{author} is the author of {registration.model_name} version {version}; another person reviews it"
        )


def _check_verdict(registration: Registration, version: int) -> None:
    if registration.verdict not in ("pass", "baseline"):
        raise NotAllowed(
            f"{registration.model_name} version {version} has the verdict {registration.verdict}; only pass, or "
            f"baseline for a first version, can be approved; the evidence: mansard review {version}"
        )


def _check_baseline(journal: Journal, registration: Registration, version: int) -> None:
    model, stable = registration.model_name, journal.pointers(registration.model_name).stable
    if registration.verdict == "baseline" and stable not in (None, version):
        raise NotAllowed(
            f"{model} version {version} has the verdict baseline, which counts only while nothing is stable, and "
            f"version {stable} is; judge it against that: mansard gate {version}"
        )
    if stable != registration.baseline_version:
        raise _baseline_moved(model, version, stable, registration.baseline_version)


def _baseline_moved(model: str, version: int, stable: int | None, baseline: int | None) -> Conflict:
    if stable == version:
        return Conflict(f"{model} version {version} is stable already; nothing to release")
    named = "nothing" if baseline is None else f"version {baseline}"
    return Conflict(
        f"{model} version {version} was judged against {named}, and stable is {stable} now; "
        f"next: mansard gate {version}"
    )


def _check_not_retreated(journal: Journal, model: str, version: int) -> None:
    entries = journal.entries(model, kinds=(APPROVED, ABORTED, ROLLED_BACK))
    if needs_new_approval(entries, model, version):
        last = [e for e in entries if e.version == version and e.kind != APPROVED][-1]
        did = "rolled back" if last.kind == ROLLED_BACK else "aborted"
        raise NotAllowed(
            f"{model} version {version} was {did} by {last.who} at {last.at}, after its approval; "
            f"next: {_next(version)}"
        )


def _read_approval(entry: Entry, what: str) -> Approval:
    try:
        return Approval(**entry.body["approval"])
    except (KeyError, TypeError) as error:
        raise NotAllowed(f"{what}: entry {entry.sequence} holds no approval of format 1; approve it again") from error


def _check_signature(site: Site, approval: Approval, entry: Entry, registration: Registration) -> None:
    """The entry is what its signer signed, for this version, by somebody who may."""
    what = f"the approval of {registration.model_name} version {entry.version} (entry {entry.sequence})"
    signature = entry.body.get("signature")
    keys.require_person(site, approval.who, "reviewer")
    if not isinstance(signature, str) or not keys.verify(site.public_key(approval.who), approval.payload(), signature):
        raise NotAllowed(f"{what} is not signed by {approval.who}'s key; a reviewer approves it again")
    named = (approval.format, approval.model, approval.version, approval.who, approval.decision)
    if named != (1, registration.model_name, entry.version, entry.who, "approve"):
        raise NotAllowed(f"{what} was signed for something else: {', '.join(map(str, named[1:]))}")
    _check_reviewer(site, registration, approval.version, approval.who, approval.reason)


def _check_position(journal: Journal, approval: Approval, entry: Entry) -> None:
    """An approval copied to a later place in the journal says that its signer had not seen what lies between."""
    seen = journal.entry(approval.seen_sequence)
    between = journal.entries(approval.model, after=approval.seen_sequence, kinds=(*DECISIONS, ABORTED, ROLLED_BACK))
    unseen = [e for e in between if e.version == approval.version and e.sequence < entry.sequence]
    if seen is None or seen.digest != approval.seen_digest or unseen:
        raise NotAllowed(
            f"the approval of {approval.model} version {approval.version} (entry {entry.sequence}) was signed for an "
            f"earlier place in the journal, after entry {approval.seen_sequence}; next: {_next(approval.version)}"
        )


def _next(version: int) -> str:
    return f"mansard review {version}, then mansard approve {version} --reason TEXT"
