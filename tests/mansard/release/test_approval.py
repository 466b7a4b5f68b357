"""Who may approve what, and when an approval still counts."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mansard.errors import BadInput, Conflict, Corrupt, MansardError, NotAllowed
from mansard.records import Registration
from mansard.release.approval import approve, check_evidence, reject, sign_registration
from mansard.release.journal import Journal
from mansard.release.permission import check_approval
from mansard.site import Site
from mansard.site_sections import Person
from mansard.store.store import Store

Make = Callable[..., Registration]


def register(site: Site, journal: Journal, registration: Registration) -> int:
    return journal.register(registration, sign_registration(site, registration))


def release(journal: Journal, version: int) -> None:
    journal.start_rollout("demo", version, "otto", "", journal.pointers("demo"))
    journal.promote("demo", version, "host", "", journal.pointers("demo"))


@pytest.fixture
def two(site: Site, journal: Journal, store: Store, candidate: Make) -> Journal:
    """Version 1 (baseline) is approved and stable, version 2 is registered with the verdict pass against it."""
    first = candidate("one", verdict="baseline", base_version=None, baseline_version=None, anchor_version=None)
    register(site, journal, first)
    approve(site, journal, store, "demo", 1, "grace", "first")
    check_approval(site, journal, "demo", 1)
    release(journal, 1)
    register(site, journal, candidate("two"))
    return journal


def test_an_approval_names_everything_it_speaks_of(site: Site, two: Journal, store: Store) -> None:
    given = approve(site, two, store, "demo", 2, "grace", " code is better ")
    registration = two.registration("demo", 2)
    assert (given,) == check_approval(site, two, "demo", 2)
    assert (given.artifact, given.verdict_record) == (registration.artifact, registration.verdict_record)
    assert (given.who, given.reason, given.decision) == ("grace", "code is better", "approve")
    assert given.baseline_version == 1
    assert given.people_digest == site.people_digest()
    entry = two.entries("demo", kinds=("approved",))[-1]
    assert (entry.version, entry.who, entry.why) == (2, "grace", "code is better")
    assert json.dumps(entry.body["approval"])


@pytest.mark.parametrize(
    ("who", "error", "message"),
    [
        ("ada", NotAllowed, "ada has the roles author, operator, not reviewer; who may: grace, both"),
        ("mallory", NotAllowed, "'mallory' is not one of the people"),
        ("otto", NotAllowed, "otto has the roles operator, not reviewer"),
    ],
)
def test_only_a_reviewer_approves(
    site: Site, two: Journal, store: Store, who: str, error: type[MansardError], message: str
) -> None:
    before = two.entries()
    with pytest.raises(error, match=message) as caught:
        approve(site, two, store, "demo", 2, who, "x")
    assert caught.value.exit_code == 5
    with pytest.raises(error, match=message):
        reject(site, two, "demo", 2, who, "x")
    assert two.entries() == before


def test_an_author_who_reviews_does_not_approve_their_own(
    site: Site, two: Journal, store: Store, candidate: Make, with_people: Callable[..., Site]
) -> None:
    register(site, two, candidate("three", author="both"))
    with pytest.raises(NotAllowed, match="both is the author of demo version 3"):
        approve(site, two, store, "demo", 3, "both", "mine")
    approve(site, two, store, "demo", 3, "grace", "theirs")
    alias = with_people(twin=Person(("reviewer",), site.public_key("both").hex()))
    with pytest.raises(NotAllowed, match="both is the author"):
        approve(alias, two, store, "demo", 3, "twin", "the same key under another name")


def test_only_an_author_registers(site: Site, candidate: Make) -> None:
    with pytest.raises(NotAllowed, match="grace has the roles reviewer, operator, not author"):
        sign_registration(site, candidate(author="grace"))
    with pytest.raises(NotAllowed, match="not one of the people"):
        sign_registration(site, candidate(author="mallory"))


@pytest.mark.parametrize("verdict", ["fail", "inconclusive", "unheard of"])
def test_a_verdict_that_is_not_pass_is_not_approved(
    site: Site, two: Journal, store: Store, candidate: Make, verdict: str
) -> None:
    register(site, two, candidate("three", verdict=verdict))
    with pytest.raises(NotAllowed, match=f"version 3 has the verdict {verdict}"):
        approve(site, two, store, "demo", 3, "grace", "please")
    reject(site, two, "demo", 3, "grace", "indeed")


def test_a_baseline_is_approved_only_while_nothing_is_stable(
    site: Site, two: Journal, store: Store, candidate: Make
) -> None:
    register(site, two, candidate("three", verdict="baseline", baseline_version=None))
    with pytest.raises(NotAllowed, match="version 1 is; judge it against that: mansard gate 3"):
        approve(site, two, store, "demo", 3, "grace", "x")
    with pytest.raises(Conflict, match="version 1 is stable already"):
        approve(site, two, store, "demo", 1, "grace", "x")


def test_bad_arguments_are_refused(site: Site, two: Journal, store: Store) -> None:
    for reason in ("", " \n"):
        with pytest.raises(BadInput, match="--reason is empty"):
            approve(site, two, store, "demo", 2, "grace", reason)
    with pytest.raises(BadInput, match="demo has no version 9; registered are: 1, 2"):
        approve(site, two, store, "demo", 9, "grace", "x")
    with pytest.raises(BadInput, match="no version 2; registered are: none"):
        check_approval(site, two, "other", 2)


def object_files(store: Store, snapshot: str) -> list[Path]:
    digests = {digest for _, _, digest, _ in store.manifest(snapshot).objects()}
    return [p for p in store.root.rglob("*") if p.is_file() and any(d.endswith(p.name) for d in digests)]


@pytest.mark.parametrize("what", ["artifact", "verdict_record"])
@pytest.mark.parametrize("how", ["flipped", "removed", "manifest"])
def test_changed_evidence_is_not_approved(site: Site, two: Journal, store: Store, what: str, how: str) -> None:
    snapshot = getattr(two.registration("demo", 2), what)
    victim = object_files(store, snapshot)[-1]
    if how == "manifest":
        victim = store.root / "manifests" / snapshot
    victim.chmod(0o644)
    if how == "removed":
        victim.unlink()
    else:
        data = bytearray(victim.read_bytes())
        data[-1] ^= 1
        victim.write_bytes(data)
    with pytest.raises(Corrupt, match=snapshot[:12]) as caught:
        approve(site, two, store, "demo", 2, "grace", "looks fine")
    assert caught.value.exit_code == 6
    assert [e.version for e in two.entries("demo", kinds=("approved",))] == [1]
    with pytest.raises(Corrupt):
        check_evidence(store, two.registration("demo", 2))


def test_an_unapproved_or_rejected_version_is_not_released(site: Site, two: Journal, store: Store) -> None:
    with pytest.raises(NotAllowed, match="is not approved; next: mansard review 2, then mansard approve 2"):
        check_approval(site, two, "demo", 2)
    approve(site, two, store, "demo", 2, "grace", "yes")
    reject(site, two, "demo", 2, "both", "no: wrong licence")
    with pytest.raises(NotAllowed, match=r"was rejected by both at .*: no: wrong licence"):
        check_approval(site, two, "demo", 2)
    approve(site, two, store, "demo", 2, "grace", "licence is right now")
    assert check_approval(site, two, "demo", 2)[0].reason == "licence is right now"


def test_a_moved_baseline_is_a_conflict_that_names_gate(
    site: Site, two: Journal, store: Store, candidate: Make
) -> None:
    register(site, two, candidate("three"))
    for version in (2, 3):
        approve(site, two, store, "demo", version, "grace", "good")
    release(two, 2)
    with pytest.raises(Conflict, match="judged against version 1, and stable is 2 now; next: mansard gate 3") as caught:
        check_approval(site, two, "demo", 3)
    assert caught.value.exit_code == 7
    with pytest.raises(Conflict, match="mansard gate 3"):
        approve(site, two, store, "demo", 3, "grace", "good")
    with pytest.raises(Conflict, match="version 2 is stable already"):
        check_approval(site, two, "demo", 2)


def test_a_version_judged_again_needs_a_new_approval(site: Site, two: Journal, store: Store, candidate: Make) -> None:
    register(site, two, candidate("three"))
    for version in (2, 3):
        approve(site, two, store, "demo", version, "grace", "good")
    release(two, 2)
    record = store.put_files({"verdict.json": b"again"})
    again = replace(two.registration("demo", 3), baseline_version=2, verdict_record=record)
    two.judge(3, again, sign_registration(site, again), "ada", "the baseline moved")
    with pytest.raises(NotAllowed, match="was judged again after its approval"):
        check_approval(site, two, "demo", 3)
    approve(site, two, store, "demo", 3, "grace", "still good")
    assert check_approval(site, two, "demo", 3)[0].baseline_version == 2


@pytest.mark.parametrize("retreat", ["abort", "rollback"])
def test_an_aborted_or_rolled_back_version_needs_a_later_approval(
    site: Site, two: Journal, store: Store, retreat: str
) -> None:
    approve(site, two, store, "demo", 2, "grace", "good")
    two.start_rollout("demo", 2, "otto", "", two.pointers("demo"))
    if retreat == "abort":
        two.abort("demo", 2, "host", "dead engine", two.pointers("demo"))
    else:
        two.promote("demo", 2, "host", "", two.pointers("demo"))
        two.rollback("demo", 1, "otto", "bad answers", two.pointers("demo"))
    with pytest.raises(NotAllowed, match=r"was (aborted by host|rolled back by otto) at .*, after its approval"):
        check_approval(site, two, "demo", 2)
    approve(site, two, store, "demo", 2, "grace", "fixed the engine")
    check_approval(site, two, "demo", 2)


def test_changed_people_void_an_approval_and_are_journaled(
    site: Site, two: Journal, store: Store, with_people: Callable[..., Site]
) -> None:
    approve(site, two, store, "demo", 2, "grace", "good")
    fewer = with_people(otto=None)
    with pytest.raises(NotAllowed, match=r"the people of .* changed since it was approved"):
        check_approval(fewer, two, "demo", 2)
    assert [e.body["people_digest"] for e in two.entries(kinds=("people_changed",))] == [site.people_digest()]
    approve(fewer, two, store, "demo", 2, "grace", "good")
    check_approval(fewer, two, "demo", 2)
    told = two.entries(kinds=("people_changed",))
    assert [e.body["people_digest"] for e in told] == [site.people_digest(), fewer.people_digest()]
    assert "otto" not in told[-1].body["people"]


def test_a_reviewer_or_author_who_left_or_lost_the_role_counts_no_more(
    site: Site, two: Journal, store: Store, with_people: Callable[..., Site]
) -> None:
    approve(site, two, store, "demo", 2, "grace", "good")
    key = site.public_key("grace").hex()
    for changed in (with_people(grace=None), with_people(grace=Person(("operator",), key)), with_people(ada=None)):
        with pytest.raises(NotAllowed):
            check_approval(changed, two, "demo", 2)


def test_an_unsigned_or_wrongly_signed_registration_is_not_approved(
    site: Site, two: Journal, store: Store, candidate: Make
) -> None:
    three, four = candidate("three"), candidate("four")
    two.register(three, None)
    two.register(four, sign_registration(site, three))
    for version in (3, 4):
        with pytest.raises(NotAllowed, match="not signed by its author ada's key"):
            approve(site, two, store, "demo", version, "grace", "good")


def forge(journal: Journal, **changes: object) -> None:
    """Append the newest approval once more, changed: what somebody who can write the journal could do."""
    body = json.loads(json.dumps(journal.entries("demo", kinds=("approved",))[-1].body))
    who = str(changes.pop("entry_who", "grace"))
    body["approval"].update(changes.pop("approval", {}))
    body.update(changes)
    journal.append("demo", "approved", who, "forged", body)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"approval": {"reason": "changed"}}, "not signed by grace's key"),
        ({"approval": {"who": "both"}, "entry_who": "both"}, "not signed by both's key"),
        ({"approval": {"who": "mallory"}, "entry_who": "mallory"}, "'mallory' is not one of the people"),
        ({"signature": None}, "not signed"),
        ({"signature": "00" * 64}, "not signed"),
        ({"approval": {"more": 1}}, "holds no approval of format 2"),
        ({"entry_who": "both"}, "signed for something else"),
        ({"version": 3}, "signed for something else"),
    ],
)
def test_a_forged_approval_is_refused(
    site: Site, two: Journal, store: Store, candidate: Make, changes: dict[str, object], message: str
) -> None:
    register(site, two, candidate("three"))
    approve(site, two, store, "demo", 2, "grace", "good")
    forge(two, **changes)
    with pytest.raises(NotAllowed, match=message):
        check_approval(site, two, "demo", 3 if "version" in changes else 2)


def test_an_approval_replayed_after_an_abort_or_a_rejection_is_refused(
    site: Site, two: Journal, store: Store
) -> None:
    approve(site, two, store, "demo", 2, "grace", "good")
    forge(two)
    with pytest.raises(NotAllowed, match="signed for an earlier place in the journal"):
        check_approval(site, two, "demo", 2)
    approve(site, two, store, "demo", 2, "grace", "good")
    two.start_rollout("demo", 2, "otto", "", two.pointers("demo"))
    two.abort("demo", 2, "host", "dead engine", two.pointers("demo"))
    forge(two)
    with pytest.raises(NotAllowed, match="signed for an earlier place in the journal"):
        check_approval(site, two, "demo", 2)


def test_a_rejection_signed_does_not_serve_as_an_approval(site: Site, two: Journal) -> None:
    reject(site, two, "demo", 2, "grace", "no")
    body = two.entries("demo", kinds=("rejected",))[-1].body
    two.append("demo", "approved", "grace", "forged", body)
    with pytest.raises(NotAllowed, match="signed for something else"):
        check_approval(site, two, "demo", 2)


def test_an_approval_without_the_private_key_records_nothing(site: Site, two: Journal, store: Store) -> None:
    (site.keys / "grace.key").unlink()
    before = two.entries()
    with pytest.raises(NotAllowed, match="no private key of grace here"):
        approve(site, two, store, "demo", 2, "grace", "good")
    assert two.entries() == before
