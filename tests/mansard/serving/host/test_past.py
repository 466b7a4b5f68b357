"""The past that users are compared with once the canary has all of the traffic: outages of stable are no part of it."""

from pathlib import Path

import pytest

from mansard.release.analysis import Finding, Limits, judge, overall
from mansard.release.rollout import LATENCIES
from mansard.serving.host.past import PAST_SECONDS, Past, add_tables
from mansard.serving.host.sticky_keys import Record, Table, add_records, make_sample
from mansard.serving.host.windows import Windows
from mansard.serving.split import key_digest
from mansard.site import Site
from mansard.site_sections import Environment

LIMITS = Limits(0.02, dict.fromkeys(LATENCIES, 1.5), 2.0)
NUM_USERS = 100
NOW = 50_000.0


def record(user: int, ended: float, is_error: bool, version: int = 1) -> Record:
    key = f"{key_digest('demo', f'user-{user}'):016x}"
    latency = 0.001 if is_error else 0.5
    return Record(ended, "demo", version, key, "error" if is_error else "ok", None, None, latency, None, f"{1:016x}")


def normal(seconds: int, end: float = NOW) -> list[Record]:
    """One request a user every ten seconds, none of them an error."""
    times = range(0, seconds, 10)
    return [record(user, end - seconds + at + user / 10, False) for at in times for user in range(NUM_USERS)]


def canary_table(error_share: float) -> Table:
    """20 requests a user, so many of them errors."""
    table: Table = {}
    num_errors = round(20 * error_share)
    add_records(table, [record(u, NOW + i, i < num_errors, 2) for u in range(NUM_USERS) for i in range(20)])
    return table


def findings(past: Table, error_share: float) -> tuple[Finding, ...]:
    return judge(make_sample(canary_table(error_share), {}, past, 100, ""), LIMITS, 0.01, seed=1)


@pytest.mark.parametrize("num_normal", [5, 20])
def test_six_users_who_failed_a_thousand_times_in_an_old_outage_let_no_failing_canary_pass(num_normal: int) -> None:
    past: Table = {}
    add_records(past, normal(10 * num_normal))
    add_records(past, [record(user, 1000.0, True) for user in range(6) for _ in range(1254)])
    assert overall(findings(past, 0.3)) == "fail"
    assert overall(findings(past, 0.0)) == "pass"


def windows(tmp_path: Path, outages: list[tuple[float, float]]) -> Windows:
    site = Site(tmp_path / "site.yaml", tmp_path, tmp_path, ("demo",), {"main": Environment(tmp_path, tmp_path)}, {})
    return Windows(site, "demo", 2, 1, 7, lambda: outages)


@pytest.mark.parametrize("is_recorded", [True, False])
def test_an_outage_that_everybody_felt_is_no_part_of_the_past(tmp_path: Path, is_recorded: bool) -> None:
    began = NOW - 600.0
    rollout = windows(tmp_path, [(began, began + 300.0)] if is_recorded else [])
    rollout.take(normal(1200, began) + normal(300))
    rollout.take([record(user, began + second, True) for second in range(300) for user in range(NUM_USERS)])
    rollout.begin_step({})
    assert rollout.past is not None
    assert overall(findings(rollout.past, 0.3)) == "fail"
    assert overall(findings(rollout.past, 0.0)) == "pass"


def test_beside_a_long_outage_that_the_journal_knows_a_short_one_that_it_does_not_is_no_part_of_the_past() -> None:
    past, began = Past(), NOW - 1200.0
    past.add(normal(300))
    past.add([record(user, began + second, True) for second in range(0, 900, 10) for user in range(NUM_USERS)])
    past.add([record(user, NOW - 50.0, user < 60) for user in range(NUM_USERS)])
    table = past.table([(began, began + 895.0)])
    assert overall(findings(table, 0.3)) == "fail"
    assert sum(row[1] for row in table.values()) == 0


def test_an_outage_since_the_rollout_began_is_no_part_of_it_either(tmp_path: Path) -> None:
    rollout = windows(tmp_path, [])
    rollout.take(normal(1200))
    rollout.begin_step({})
    rollout.step_began = NOW
    rollout.take([record(user, NOW + second, True) for second in range(60) for user in range(NUM_USERS)])
    rollout.take([record(user, NOW + 60 + at, False) for at in range(60) for user in range(NUM_USERS)])
    sample = rollout.sample(100)
    assert sample.past_sums_MK[0].sum() == 0.0
    rollout.canary = canary_table(0.3)
    assert overall(judge(rollout.sample(100), LIMITS, 0.01, seed=1)) == "fail"


def test_the_past_is_bounded_and_steady_errors_stay_in_it() -> None:
    past = Past()
    past.add(normal(600, NOW - 2 * PAST_SECONDS))
    past.add(normal(600))
    assert sum(row[0] for row in past.table([]).values()) == 60 * NUM_USERS
    steady = Past()
    steady.add([record(user, NOW + at, user < 30) for at in range(0, 600, 10) for user in range(NUM_USERS)])
    assert sum(row[1] for row in steady.table([]).values()) == 60 * 30


def test_records_of_one_rollout_are_folded_so_that_a_long_one_needs_little_memory() -> None:
    past = Past()
    for start in range(0, 3600, 60):
        past.add([record(user, NOW + start + at, False) for at in range(0, 60, 10) for user in range(NUM_USERS)])
        past.fold(NOW + start + 60, [])
    assert sum(len(rows) for rows in past.slices.values()) <= 3 * NUM_USERS
    assert sum(row[0] for row in past.table([]).values()) == 360 * NUM_USERS
    past.add([record(0, NOW + 3 * PAST_SECONDS, False)])
    past.fold(NOW + 3 * PAST_SECONDS, [])
    assert len(past.shares) <= 3


def test_a_rollout_that_the_next_host_takes_up_counts_no_record_twice(tmp_path: Path) -> None:
    before, since = normal(200, NOW), normal(100, NOW + 300)
    first = windows(tmp_path, [])
    first.take(before)
    first.begin_step({})
    first.take(since)
    following = windows(tmp_path, [])
    following.take(before + since)  # a worker tells the next host all that it remembers
    following.begin_step({})
    totals = [add_tables(each.past or {}, each.beside.table([])) for each in (first, following)]
    assert {key: row[0] for key, row in totals[1].items()} == {key: row[0] for key, row in totals[0].items()}
    assert totals[1][before[0].user][0] == 30
