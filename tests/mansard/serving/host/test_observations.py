"""Differences of the router workers' counters."""

import pytest

from mansard.errors import MansardError
from mansard.serving.host.observations import (
    Counts,
    Reports,
    Seen,
    WorkerReport,
    consecutive_failures_since,
    counts_since,
    parse_report,
)


def reports(**workers: Seen) -> Reports:
    return {name: WorkerReport(1, {"demo": {2: seen}}) for name, seen in workers.items()}


def test_counts_are_sums_over_workers_of_what_came_since() -> None:
    before = reports(a=Seen(10, 1, ()), b=Seen(5, 5, (5,)))
    now = reports(a=Seen(14, 2, ()), b=Seen(8, 5, ()))
    assert counts_since(before, now, "demo", 2) == Counts(7, 1)
    assert counts_since(before, now, "demo", 3) == Counts(0, 0)
    assert counts_since({}, now, "other", 2) == Counts(0, 0)


def test_a_worker_that_restarted_counts_from_zero() -> None:
    before = reports(a=Seen(100, 50, ()), gone=Seen(7, 7, (7,)))
    assert counts_since(before, reports(a=Seen(4, 1, (1,))), "demo", 2) == Counts(4, 1)
    assert counts_since(before, reports(new=Seen(4, 1, (1,))), "demo", 2) == Counts(4, 1)


def test_failures_from_before_the_walk_are_not_held_against_the_canary() -> None:
    before = reports(a=Seen(10, 9, (9,)))
    assert consecutive_failures_since(before, reports(a=Seen(10, 9, (9,))), "demo", 2, 1) == 0
    assert consecutive_failures_since(before, reports(a=Seen(12, 11, (11,))), "demo", 2, 1) == 2
    assert consecutive_failures_since(before, reports(a=Seen(17, 16, (16,)), b=Seen(1, 1, (1,))), "demo", 2, 1) == 7


def test_a_run_of_failures_is_no_one_tenants_to_make_where_others_ask() -> None:
    of_one, of_several = reports(a=Seen(200, 200, (200,))), reports(a=Seen(10, 10, (2, 2, 2, 2, 2)))
    assert [consecutive_failures_since({}, of_one, "demo", 2, number) for number in (1, 2, 3, 10)] == [200, 3, 2, 1]
    assert [consecutive_failures_since({}, of_several, "demo", 2, number) for number in (1, 3, 10)] == [10, 10, 5]


def test_refused_and_cancelled_requests_are_no_evidence() -> None:
    counters = {"requests": 10, "errors": 2, "failures_of_tenants": [1], "engine_4xx": 3, "cancelled": 1}
    report = parse_report({"term": 4, "models": {"demo": {"versions": {"2": counters}}}})
    assert report == WorkerReport(4, {"demo": {2: Seen(6, 2, (1,))}})


@pytest.mark.parametrize("tree", [{}, {"term": None, "models": {}}, {"term": 1, "models": {"demo": []}}])
def test_another_form_is_refused(tree: dict[str, object]) -> None:
    with pytest.raises(MansardError, match="not of format 1"):
        parse_report(tree)
