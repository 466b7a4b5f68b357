"""The site's policy: how many approve, how long that counts, whose key counts when; and that every move is checked."""

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
import yaml

from mansard.errors import BadInput, NotAllowed
from mansard.records import Registration
from mansard.release.approval import approve, sign_registration
from mansard.release.events import as_text
from mansard.release.journal import Journal
from mansard.release.keys import generate_key
from mansard.release.people import record_people
from mansard.release.permission import check_approval, guard_of
from mansard.site import Site, load_site
from mansard.store.store import Store

Make = Callable[..., Registration]
NOW = datetime.now(UTC)


def changed(site: Site, approval: dict[str, int] | None = None, **people: dict[str, Any]) -> Site:
    """The site file with a policy and with more keys under some people, written and read again."""
    tree = yaml.safe_load(site.path.read_text())
    for name, more in people.items():
        tree["people"][name].update(more)
    tree["approval"] = approval or {"approvals": 1, "days": 30}
    site.path.write_text(yaml.safe_dump(tree))
    return load_site(site.path)


@pytest.fixture
def judged(site: Site, candidate: Make) -> Iterator[Journal]:
    """Version 1 is a baseline that waits for its first approval; every move of this journal is guarded."""
    with Journal.open(site.journal, guard=guard_of(site.path)) as journal:
        first = candidate("one", verdict="baseline", base_version=None, baseline_version=None, anchor_version=None)
        journal.register(first, sign_registration(site, first))
        yield journal


def test_two_different_reviewers_must_approve_where_the_site_says_two(
    site: Site, judged: Journal, store: Store
) -> None:
    site = changed(site, {"approvals": 2, "days": 30})
    approve(site, judged, store, "demo", 1, "grace", "good")
    approve(site, judged, store, "demo", 1, "grace", "very good")
    with pytest.raises(NotAllowed, match=r"has 1 of 2 approvals \(grace\); next: another reviewer"):
        check_approval(site, judged, "demo", 1)
    approve(site, judged, store, "demo", 1, "both", "indeed")
    assert {a.who for a in check_approval(site, judged, "demo", 1)} == {"grace", "both"}


def test_one_key_under_two_names_is_one_approval(site: Site, judged: Journal, store: Store) -> None:
    tree = yaml.safe_load(site.path.read_text())
    tree["people"]["twin"] = {"roles": ["reviewer"], "public_key": site.public_key("grace").hex()}
    site.path.write_text(yaml.safe_dump(tree))
    (site.keys / "twin.key").write_bytes((site.keys / "grace.key").read_bytes())
    (site.keys / "twin.key").chmod(0o600)
    site = changed(site, {"approvals": 2, "days": 30})
    for name in ("grace", "twin"):
        approve(site, judged, store, "demo", 1, name, "good")
    with pytest.raises(NotAllowed, match="has 1 of 2 approvals"):
        check_approval(site, judged, "demo", 1)


def test_a_policy_that_changes_afterwards_asks_for_new_approvals(site: Site, judged: Journal, store: Store) -> None:
    approve(site, judged, store, "demo", 1, "grace", "good")
    stricter = changed(site, {"approvals": 2, "days": 30})
    with pytest.raises(NotAllowed, match=r"the people of .* changed since it was approved"):
        check_approval(stricter, judged, "demo", 1)


def test_an_approval_expires(site: Site, judged: Journal, store: Store) -> None:
    site = changed(site, {"approvals": 1, "days": 7})
    given = approve(site, judged, store, "demo", 1, "grace", "good")
    check_approval(site, judged, "demo", 1, now=datetime.now(UTC) + timedelta(days=6, hours=23))
    with pytest.raises(NotAllowed, match=f"approval by grace expired at {given.expires_at}; next: mansard review 1"):
        check_approval(site, judged, "demo", 1, now=datetime.now(UTC) + timedelta(days=7))


@pytest.mark.parametrize("name", ["grace", "ada"])
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"revoked": "laptop stolen"}, r"is revoked \(laptop stolen\)"),
        ({"valid_until": NOW - timedelta(minutes=1)}, "was valid until"),
        ({"valid_from": NOW + timedelta(days=1)}, "is valid from"),
    ],
)
def test_a_key_that_does_not_count_signs_nothing_and_approves_nothing(
    site: Site, judged: Journal, store: Store, candidate: Make, name: str, more: dict[str, object], message: str
) -> None:
    approve(site, judged, store, "demo", 1, "grace", "good")
    site = changed(site, **{name: more})
    before = judged.entries()
    with pytest.raises(NotAllowed, match=f"{name}'s key {message}") as caught:
        approve(site, judged, store, "demo", 1, "grace", "good")
    assert caught.value.exit_code == 5
    if name == "ada":
        with pytest.raises(NotAllowed, match=f"{name}'s key {message}"):
            sign_registration(site, candidate("two"))
    with pytest.raises(NotAllowed):
        check_approval(site, judged, "demo", 1)
    assert judged.entries() == before


def test_a_reviewers_key_that_expires_after_the_approval_takes_it_along(
    site: Site, judged: Journal, store: Store
) -> None:
    site = changed(site, grace={"valid_until": NOW + timedelta(days=2)})
    approve(site, judged, store, "demo", 1, "grace", "good")
    check_approval(site, judged, "demo", 1, now=NOW + timedelta(days=1))
    with pytest.raises(NotAllowed, match="grace's key was valid until"):
        check_approval(site, judged, "demo", 1, now=NOW + timedelta(days=3))


def test_an_approval_signed_while_the_clock_had_jumped_ahead_does_not_count(
    site: Site, judged: Journal, store: Store
) -> None:
    """It would count for as much longer; the journal's order does not depend on clocks."""
    approve(site, judged, store, "demo", 1, "grace", "good")
    with pytest.raises(NotAllowed, match="which is in the future: look at the clocks"):
        check_approval(site, judged, "demo", 1, now=datetime.now(UTC) - timedelta(hours=1))


def test_every_move_towards_a_version_is_checked_and_the_ways_back_are_not(
    site: Site, judged: Journal, store: Store
) -> None:
    with pytest.raises(NotAllowed, match="is not approved"):
        judged.start_rollout("demo", 1, "otto", "", judged.pointers("demo"))
    approve(site, judged, store, "demo", 1, "grace", "good")
    with pytest.raises(NotAllowed, match="both has the roles author, reviewer, not operator"):
        judged.start_rollout("demo", 1, "both", "", judged.pointers("demo"))
    judged.start_rollout("demo", 1, "otto", "", judged.pointers("demo"))
    changed(site, grace={"revoked": "laptop stolen"})
    pointers = judged.pointers("demo")
    with pytest.raises(NotAllowed):
        judged.step("demo", 1, 5, "host", "", pointers)
    with pytest.raises(NotAllowed):
        judged.promote("demo", 1, "host", "", pointers)
    assert judged.pointers("demo") == pointers
    judged.abort("demo", 1, "host", "its approval does not count any more", pointers)
    judged.verify()


def test_rolling_back_to_a_once_stable_version_asks_for_no_key(
    site: Site, judged: Journal, store: Store, candidate: Make
) -> None:
    approve(site, judged, store, "demo", 1, "grace", "good")
    judged.start_rollout("demo", 1, "otto", "", judged.pointers("demo"))
    judged.promote("demo", 1, "host", "", judged.pointers("demo"))
    second = candidate("two")
    judged.register(second, sign_registration(site, second))
    approve(site, judged, store, "demo", 2, "grace", "good")
    judged.start_rollout("demo", 2, "otto", "", judged.pointers("demo"))
    judged.promote("demo", 2, "host", "", judged.pointers("demo"))
    changed(site, grace={"revoked": "laptop stolen"}, ada={"revoked": "the same laptop"})
    judged.rollback("demo", 1, "otto", "bad answers", judged.pointers("demo"))
    assert judged.pointers("demo").stable == 1


def test_reviewers_who_approve_at_once_both_count(site: Site, judged: Journal, store: Store) -> None:
    site = changed(site, {"approvals": 2, "days": 30})
    record_people(site, judged, "ada")
    together = Barrier(2)

    def sign(name: str) -> None:
        with Journal.open(site.journal) as journal:
            together.wait()
            approve(site, journal, store, "demo", 1, name, "good")

    threads = [Thread(target=sign, args=(name,)) for name in ("grace", "both")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(check_approval(site, judged, "demo", 1)) == 2


def test_an_approval_that_names_another_baseline_is_refused(site: Site, judged: Journal, store: Store) -> None:
    """Signed by a reviewer, but not for what the verdict compared with."""
    from mansard.release import keys

    approve(site, judged, store, "demo", 1, "grace", "good")
    body = json.loads(json.dumps(judged.entries("demo", kinds=("approved",))[-1].body))
    body["approval"]["baseline_artifact"] = "f" * 64
    body["signature"] = keys.sign("grace", site, {"record": "approval", **body["approval"]})
    judged.append("demo", "rejected", "grace", "no", {"version": 1})  # so that the true one stands no more
    tip = judged.tip()
    assert tip is not None
    judged.append("demo", "approved", "grace", "forged", body)
    with pytest.raises(NotAllowed, match="names another baseline"):
        check_approval(site, judged, "demo", 1)


def test_a_change_of_people_or_policy_is_an_event_with_before_and_after(site: Site, journal: Journal) -> None:
    record_people(site, journal, "ada")
    record_people(site, journal, "ada")
    revoked = changed(site, {"approvals": 2, "days": 5}, grace={"revoked": "laptop stolen", "valid_until": NOW})
    record_people(revoked, journal, "host")
    first, second = journal.entries(kinds=("people_changed",))
    assert (first.body["before"], second.body["before"]) == (None, first.body["people_digest"])
    assert second.body["approval"] == {"approvals": 2, "days": 5}
    assert second.body["people"]["grace"]["revoked"] == "laptop stolen"
    assert as_text(datetime.fromisoformat(second.body["people"]["grace"]["valid_until"])) == as_text(NOW)


@pytest.mark.parametrize(
    ("person", "approval", "message"),
    [
        ({"valid_until": "soon"}, {}, "valid_until: 'soon' is not a date"),
        ({"valid_from": 2026}, {}, "2026 is not a date"),
        ({"valid_from": "2026-02-01", "valid_until": "2026-01-01"}, {}, "is not after valid_from"),
        ({"revoked": True}, {}, "True is not of type str"),
        ({}, {"approvals": 0}, r"approval.approvals: 0 is less than 1"),
        ({}, {"days": -1}, r"approval.days: -1 is less than 1"),
        ({}, {"quorum": 2}, "unknown key 'quorum'"),
    ],
)
def test_a_people_section_that_says_nonsense_is_refused(
    site: Site, person: dict[str, object], approval: dict[str, int], message: str
) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        changed(site, approval, grace=person)
    assert "\n" not in str(caught.value)


def test_nobody_is_called_host(site: Site, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no person"):
        generate_key("host", site)
    tree = yaml.safe_load(site.path.read_text())
    tree["people"]["host"] = tree["people"]["grace"]
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(BadInput, match="take another name"):
        load_site(tmp_path / "other.yaml")


def test_dates_of_every_form_are_moments_in_utc(site: Site) -> None:
    forms = ["2027-01-01", "2027-01-01T00:00:00Z", "2027-01-01T02:00:00+02:00", "2027-01-01 00:00:00"]
    found = {changed(site, grace={"valid_until": form}).people["grace"].valid_until for form in forms}
    assert found == {datetime(2027, 1, 1, tzinfo=UTC)}
