"""Approvals: records signed by people, for exactly one artifact, one verdict record, one baseline, one people section.

Guarantees: nobody approves their own upgrade, by name or by key; no failed or unknown verdict is approved; a decision
is recorded right after the entry that its signer had seen last. Whether an approval still counts is permission.py's.
"""

from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from mansard.errors import BadInput, Conflict, Corrupt, NotAllowed
from mansard.records import Registration, SnapshotId
from mansard.release import keys
from mansard.release.events import APPROVED, REJECTED, as_text, utc_now
from mansard.release.journal import Journal
from mansard.release.people import record_people
from mansard.site import Site

if TYPE_CHECKING:
    from mansard.store.store import Store


ATTEMPTS = 5
"""So often a decision is signed anew when somebody else wrote to the journal meanwhile."""


@dataclass(frozen=True, slots=True)
class Approval:
    """A person's decision, approve or reject. Format 1 had no expiry and no baseline's artifact: it counts no more.

    `seen_*` name the journal's newest entry when it was signed.
    """

    format: int
    model: str
    version: int
    artifact: SnapshotId
    verdict_record: SnapshotId
    baseline_version: int | None
    baseline_artifact: SnapshotId | None
    people_digest: str
    who: str
    at: str
    expires_at: str
    reason: str
    decision: str
    seen_sequence: int
    seen_digest: str

    def payload(self) -> dict[str, Any]:
        """What is signed; `record` keeps it apart from every other kind of signature."""
        return {"record": "approval", **asdict(self)}


def sign_registration(site: Site, registration: Registration) -> str:
    """The author's signature. NotAllowed unless the author has the role and a key that counts, private half here."""
    keys.require_key(site, registration.author, "author", utc_now())
    return keys.sign(registration.author, site, _registration_payload(registration))


def is_signed(site: Site, registration: Registration, signature: str | None) -> bool:
    """Whether the key that the site knows for the author signed exactly this registration."""
    if signature is None or registration.author not in site.people:
        return False
    return keys.verify(site.public_key(registration.author), _registration_payload(registration), signature)


def check_registration(
    site: Site, registration: Registration, signature: str | None, now: datetime | None = None
) -> None:
    """NotAllowed unless the author, whose key counts now, signed exactly this registration."""
    author = registration.author
    keys.require_key(site, author, "author", now or utc_now())
    if not is_signed(site, registration, signature):
        raise NotAllowed(
            f"the registration of {registration.model_name} is not signed by its author {author}'s key of today; "
            "mansard gate signs a version anew"
        )


def approve(
    site: Site, journal: Journal, store: "Store", model: str, version: int, who: str, reason: str
) -> Approval:
    """Sign and record that `version` may be released. Nothing is recorded unless every rule of this module holds.

    Raises BadInput (unknown version, empty reason), NotAllowed, Corrupt (evidence changed), Conflict (baseline moved).
    """
    registration, signature = _registered(journal, model, version)
    check_reviewer(site, registration, version, who, reason)
    check_verdict(registration, version)
    _check_baseline(journal, registration, version)
    check_registration(site, registration, signature)
    check_evidence(store, registration)
    return _record(site, journal, registration, version, who, reason, "approve")


def reject(site: Site, journal: Journal, model: str, version: int, who: str, reason: str) -> Approval:
    """Sign and record that `version` may not be released; any approval before it is void."""
    registration, _ = _registered(journal, model, version)
    check_reviewer(site, registration, version, who, reason)
    return _record(site, journal, registration, version, who, reason, "reject")


def check_evidence(store: "Store", registration: Registration) -> None:
    """Corrupt unless artifact and verdict record are whole: manifests, and every byte that they name."""
    for what, snapshot in (("artifact", registration.artifact), ("verdict record", registration.verdict_record)):
        if not store.holds(snapshot):
            raise Corrupt(f"{what} {snapshot[:12]} of {registration.model_name} is not whole in {store.root}")
        damages = store.verify(snapshot)
        if damages:
            raise Corrupt(f"{what} {snapshot[:12]} of {registration.model_name} changed in the store: {damages[0]}")


def _record(
    site: Site, journal: Journal, registration: Registration, version: int, who: str, reason: str, decision: str
) -> Approval:
    """Sign for the newest entry and append right after it; where another decision came between, sign anew."""
    record_people(site, journal, who)
    model, baseline = registration.model_name, registration.baseline_version
    for attempt in range(1, ATTEMPTS + 1):
        tip, now = journal.tip(), utc_now()
        assert tip is not None, "there is a registration"
        approval = Approval(
            format=2,
            model=model,
            version=version,
            artifact=registration.artifact,
            verdict_record=registration.verdict_record,
            baseline_version=baseline,
            baseline_artifact=None if baseline is None else journal.registration(model, baseline).artifact,
            people_digest=site.people_digest(),
            who=who,
            at=as_text(now),
            expires_at=as_text(now + timedelta(days=site.approval.days)),
            reason=reason.strip(),
            decision=decision,
            seen_sequence=tip.sequence,
            seen_digest=tip.digest,
        )
        body = {"version": version, "approval": asdict(approval), "signature": keys.sign(who, site, approval.payload())}
        try:
            kind = APPROVED if decision == "approve" else REJECTED
            journal.append(model, kind, who, approval.reason, body, expected_tip=tip.sequence)
            break
        except Conflict:
            if attempt == ATTEMPTS:
                raise
    return approval


def _registered(journal: Journal, model: str, version: int) -> tuple[Registration, str | None]:
    entry = journal.evidence(model, version)
    return Registration.from_json(entry.body["registration"]), entry.body["signature"]


def _registration_payload(registration: Registration) -> dict[str, Any]:
    return {"record": "registration", "format": 1, **registration.as_json()}


def check_reviewer(
    site: Site, registration: Registration, version: int, who: str, reason: str, now: datetime | None = None
) -> None:
    """NotAllowed unless `who` may decide on this version; BadInput without a reason."""
    if not reason.strip():
        raise BadInput("--reason is empty; say in a sentence why, the next reader has only that")
    keys.require_key(site, who, "reviewer", now or utc_now())
    author = registration.author
    if who == author or (author in site.people and site.public_key(who) == site.public_key(author)):
        raise NotAllowed(
            f"{author} is the author of {registration.model_name} version {version}; another person reviews it"
        )


def check_verdict(registration: Registration, version: int) -> None:
    """NotAllowed for a verdict that cannot be approved."""
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
        raise baseline_moved(registration, version, stable)


def baseline_moved(registration: Registration, version: int, stable: int | None) -> Conflict:
    """What to say, and the way forward, when stable is not what the version was judged against."""
    model, baseline = registration.model_name, registration.baseline_version
    if stable == version:
        return Conflict(f"{model} version {version} is stable already; nothing to release")
    named = "nothing" if baseline is None else f"version {baseline}"
    return Conflict(
        f"{model} version {version} was judged against {named}, and stable is {stable} now; "
        f"next: mansard gate {version}"
    )


def next_step(version: int) -> str:
    """The commands that a reviewer types."""
    return f"mansard review {version}, then mansard approve {version} --reason TEXT"
