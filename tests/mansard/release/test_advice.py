"""Which command `status` and `review` offer: never a version that was turned down, as if it were new."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from mansard.records import Registration
from mansard.release import oncall
from mansard.release.advice import next_of_version
from mansard.release.approval import approve, reject, sign_registration
from mansard.release.events import Pointers
from mansard.release.journal import Journal
from mansard.site import Site
from mansard.store.store import Store

Make = Callable[..., Registration]
Turn = Callable[[Site, Journal], None]


def register(site: Site, journal: Journal, registration: Registration) -> Registration:
    journal.register(registration, sign_registration(site, registration))
    return registration


def approve_four(site: Site, journal: Journal) -> None:
    approve(site, journal, Store(site.store), "demo", 4, "grace", "good")


def reject_four(site: Site, journal: Journal) -> None:
    reject(site, journal, "demo", 4, "grace", "answers grew too long")


def abort_four(site: Site, journal: Journal) -> None:
    approve_four(site, journal)
    journal.start_rollout("demo", 4, "otto", "", journal.pointers("demo"))
    journal.abort("demo", 4, "host", "dead engine", journal.pointers("demo"))


def roll_back_four(site: Site, journal: Journal) -> None:
    approve_four(site, journal)
    journal.start_rollout("demo", 4, "otto", "", journal.pointers("demo"))
    journal.promote("demo", 4, "host", "all steps pass", journal.pointers("demo"))
    journal.rollback("demo", 3, "otto", "bad answers", journal.pointers("demo"))


TURNED_DOWN = [
    (reject_four, "mansard upgrade SPEC   (version 4 was rejected: mansard why 4)"),
    (abort_four, "mansard history   (version 4 was aborted; it needs a new approval to be released again)"),
    (roll_back_four, "mansard history   (version 4 was rolled back; it needs a new approval to be released again)"),
]


@pytest.mark.parametrize(("turn", "following"), TURNED_DOWN)
def test_status_offers_no_version_that_was_turned_down(
    three: Site, candidate: Make, turn: Turn, following: str
) -> None:
    with Journal.open(three.journal) as journal:
        register(three, journal, candidate("four", baseline_version=3))
        assert oncall.status(three, "demo")["next"] == "mansard review 4"
        turn(three, journal)
        assert oncall.status(three, "demo")["next"] == following
        approve_four(three, journal)
        assert oncall.status(three, "demo")["next"] == "mansard release 4"


def test_status_offers_a_waiting_version_before_one_that_was_turned_down_later(three: Site, candidate: Make) -> None:
    with Journal.open(three.journal) as journal:
        for name in ("four", "five"):
            register(three, journal, candidate(name, baseline_version=3))
        reject(three, journal, "demo", 5, "grace", "no")
    assert oncall.status(three, "demo")["next"] == "mansard review 4"


def test_status_offers_no_version_that_a_rollback_passed_over(three: Site) -> None:
    """Version 2 was stable once and nobody rolled it back; `rollback --to` leads there, not a release."""
    with Journal.open(three.journal) as journal:
        journal.rollback("demo", 1, "otto", "bad answers", journal.pointers("demo"))
    assert oncall.status(three, "demo")["next"] == "mansard upgrade SPEC"


def test_review_offers_approval_only_where_it_would_be_taken(three: Site, candidate: Make) -> None:
    four = candidate("four", baseline_version=3)

    def following(registration: Registration, version: int) -> str:
        with Journal.open(three.journal) as journal:
            return next_of_version(registration, version, journal.entries("demo"), journal.pointers("demo"), 1)

    with Journal.open(three.journal) as journal:
        register(three, journal, four)
        assert following(four, 4).startswith("mansard approve 4 ")
        approve_four(three, journal)
        assert following(four, 4) == "mansard release 4"
        assert following(replace(four, verdict="fail"), 4).startswith("mend the upgrade")
        assert following(replace(four, baseline_version=2), 4).startswith("mansard gate 4 ")
        assert following(four, 3) == "mansard status   (version 3 is stable)"
        journal.start_rollout("demo", 4, "otto", "", journal.pointers("demo"))
        assert following(four, 4) == "mansard status   (version 4 is released now)"
    against_nothing = replace(four, baseline_version=None)
    assert "against nothing, and stable is 1 now" in next_of_version(against_nothing, 4, [], Pointers(stable=1), 1)
