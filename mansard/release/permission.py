"""Whether a version may be released now: the approvals that the site's policy asks for, each as its signer left it.

Guarantees: checked at the start of a release and again inside the transaction of every later move towards the version,
against the site file as it is then. An approval counts only while nothing that it names has changed, it has not
expired, and the key of its signer counts. A forged or replayed one stops the release, whatever others there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from mansard.errors import NotAllowed
from mansard.records import Registration
from mansard.release import keys
from mansard.release.approval import (
    Approval,
    baseline_moved,
    check_registration,
    check_reviewer,
    check_verdict,
    next_step,
)
from mansard.release.emergency import refuse_forward
from mansard.release.events import (
    ABORTED,
    APPROVED,
    CANARY_STEP,
    DECISIONS,
    PROMOTED,
    REJECTED,
    ROLLED_BACK,
    ROLLOUT_STARTED,
    Entry,
    as_moment,
    utc_now,
)
from mansard.release.journal import Guard, Journal
from mansard.release.pointer import approvals_in_force, needs_new_approval
from mansard.site import Site, load_site

FUTURE = timedelta(minutes=5)
"""Clocks of two machines may differ so much; an approval from later than that was signed with a wrong clock."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is asked: may this registration of a version be released now?"""

    site: Site
    journal: Journal
    registration: Registration
    version: int
    now: datetime

    @property
    def what(self) -> str:
        return f"{self.registration.model_name} version {self.version}"


def guard_of(site_path: Path) -> Guard:
    """For Journal.open: who starts a release is an operator, and every move of a release has its approvals."""

    def guard(journal: Journal, model: str, kind: str, version: int, who: str) -> None:
        if kind not in (ROLLOUT_STARTED, CANARY_STEP, PROMOTED):
            return  # going back is free: decision 10
        site = load_site(site_path)
        refuse_forward(site, model)
        if kind == ROLLOUT_STARTED:
            keys.require_key(site, who, "operator", utc_now())
        check_approval(site, journal, model, version)

    return guard


def check_approval(
    site: Site, journal: Journal, model: str, version: int, now: datetime | None = None
) -> tuple[Approval, ...]:
    """The approvals under which `version` may be released. Raises NotAllowed, or Conflict for a moved baseline."""
    entry = journal.evidence(model, version)
    registration = Registration.from_json(entry.body["registration"])
    case = Case(site, journal, registration, version, now or utc_now())
    decisions = [e for e in journal.entries(model, kinds=DECISIONS) if e.version == version]
    _check_decided(case, decisions)
    approvals = _valid(case, decisions)
    check_verdict(registration, version)
    check_registration(site, registration, entry.body["signature"], case.now)
    _check_baseline(case)
    if len(approvals) < site.approval.approvals:
        raise NotAllowed(
            f"{case.what} has {len(approvals)} of {site.approval.approvals} approvals "
            f"({', '.join(a.who for a in approvals)}); next: another reviewer: {next_step(version)}"
        )
    return approvals


def _check_decided(case: Case, decisions: Sequence[Entry]) -> None:
    """There is a decision, it was not a rejection, and no abort or rollback came after it."""
    if not decisions:
        raise NotAllowed(f"{case.what} is not approved; next: {next_step(case.version)}")
    newest = decisions[-1]
    if newest.kind == REJECTED:
        raise NotAllowed(f"{case.what} was rejected by {newest.who} at {newest.at}: {newest.why}")
    model = case.registration.model_name
    entries = case.journal.entries(model, kinds=(APPROVED, ABORTED, ROLLED_BACK))
    if needs_new_approval(entries, model, case.version):
        last = [e for e in entries if e.version == case.version and e.kind != APPROVED][-1]
        did = "rolled back" if last.kind == ROLLED_BACK else "aborted"
        raise NotAllowed(
            f"{case.what} was {did} by {last.who} at {last.at}, after its approval; next: {next_step(case.version)}"
        )


def _valid(case: Case, decisions: Sequence[Entry]) -> tuple[Approval, ...]:
    """Approvals that count, one of each key. Raises for a forged one, and for a stale one where none counts."""
    entries = case.journal.entries(case.registration.model_name)
    standing = approvals_in_force(entries, case.registration.model_name, case.version)
    if not standing:
        raise NotAllowed(f"{case.what} was judged again after its approval; next: {next_step(case.version)}")
    found: dict[bytes, Approval] = {}
    stale = ""
    for entry in standing:
        approval = _read(case, entry)
        trouble = _staleness(case, approval)
        if trouble:
            stale = trouble
            continue
        _check_signature(case, approval, entry)
        _check_position(case.journal, approval, entry)
        found[case.site.public_key(approval.who)] = approval
    if not found:
        raise NotAllowed(f"{case.what}: {stale}; next: {next_step(case.version)}")
    return tuple(found.values())


def _read(case: Case, entry: Entry) -> Approval:
    """What the entry holds, which must be an approval of this version by whom the entry names."""
    try:
        approval = Approval(**entry.body["approval"])
    except (KeyError, TypeError) as error:
        raise NotAllowed(
            f"{case.what}: entry {entry.sequence} holds no approval of format 2; approve it again"
        ) from error
    named = (approval.format, approval.model, approval.version, approval.who, approval.decision)
    if named != (2, case.registration.model_name, entry.version, entry.who, "approve"):
        told = ", ".join(map(str, named[1:]))
        raise NotAllowed(
            f"the approval of {case.what} (entry {entry.sequence}) was signed for something else: {told}"
        )
    return approval


def _staleness(case: Case, approval: Approval) -> str:
    """What of the things that it names has changed, or that its time is over; empty when it still speaks of now."""
    registration, journal = case.registration, case.journal
    if (approval.artifact, approval.verdict_record) != (registration.artifact, registration.verdict_record):
        return "it was judged again after its approval"
    if approval.people_digest != case.site.people_digest():
        return f"the people of {case.site.path} changed since it was approved at {approval.at}"
    baseline = approval.baseline_version
    artifact = None if baseline is None else journal.registration(registration.model_name, baseline).artifact
    if baseline != registration.baseline_version or approval.baseline_artifact != artifact:
        return f"its approval names another baseline than its verdict: version {baseline}"
    try:
        signed_at, expires_at = as_moment(approval.at), as_moment(approval.expires_at)
        if case.now >= expires_at:
            return f"its approval by {approval.who} expired at {approval.expires_at}"
        if signed_at > case.now + FUTURE:
            return f"its approval by {approval.who} is of {approval.at}, which is in the future: look at the clocks"
    except (TypeError, ValueError):
        return f"its approval by {approval.who} names no moment: {approval.at!r} to {approval.expires_at!r}"
    return ""


def _check_signature(case: Case, approval: Approval, entry: Entry) -> None:
    """The entry is what its signer signed, who may review this version and whose key counts."""
    what = f"the approval of {case.what} (entry {entry.sequence})"
    signature = entry.body.get("signature")
    keys.require_key(case.site, approval.who, "reviewer", case.now)
    public = case.site.public_key(approval.who)
    if not isinstance(signature, str) or not keys.verify(public, approval.payload(), signature):
        raise NotAllowed(f"{what} is not signed by {approval.who}'s key; a reviewer approves it again")
    check_reviewer(case.site, case.registration, approval.version, approval.who, approval.reason, case.now)


def _check_position(journal: Journal, approval: Approval, entry: Entry) -> None:
    """An approval copied to a later place in the journal says that its signer had not seen what lies between."""
    seen = journal.entry(approval.seen_sequence)
    between = journal.entries(approval.model, after=approval.seen_sequence, kinds=(*DECISIONS, ABORTED, ROLLED_BACK))
    unseen = [e for e in between if e.version == approval.version and e.sequence < entry.sequence]
    if seen is None or seen.digest != approval.seen_digest or unseen:
        raise NotAllowed(
            f"the approval of {approval.model} version {approval.version} (entry {entry.sequence}) was signed for an "
            f"earlier place in the journal, after entry {approval.seen_sequence}; next: {next_step(approval.version)}"
        )


def _check_baseline(case: Case) -> None:
    stable = case.journal.pointers(case.registration.model_name).stable
    if stable != case.registration.baseline_version:
        raise baseline_moved(case.registration, case.version, stable)
