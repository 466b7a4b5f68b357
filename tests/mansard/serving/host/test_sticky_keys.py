"""Router workers' records as windows per sticky key, and the sample that the analysis gets of them."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mansard.release.analysis import METRICS
from mansard.serving.host import sticky_keys
from mansard.serving.host.sticky_keys import (
    FIELDS,
    Record,
    Table,
    add_records,
    checked_table,
    is_canary_user,
    make_sample,
    user_named,
    with_in_flight,
)
from mansard.serving.split import ModelSplit, VersionSplit, choose, key_digest

ROW = {metric.name: row for row, metric in enumerate(METRICS)}
SALT = "5" * 32


def key(name: str) -> str:
    return f"{key_digest('demo', name):016x}"


def user(name: str, tenant: int = 1) -> str:
    return user_named(key(name), f"{tenant:016x}")


def record(name: str = "ann", outcome: str = "ok", tenant: int = 1, **more: Any) -> Record:
    told = {"ttft": None, "token": None, "latency": 2.0, "output_tokens": None, "tenant": f"{tenant:016x}", **more}
    return Record(5.0, "demo", 2, key(name), outcome, **told)


def row(table: Table, name: str = "ann") -> dict[str, float]:
    return dict(zip(FIELDS, table[user(name)], strict=True))


def test_a_stream_counts_its_times_and_tokens() -> None:
    table: Table = {}
    add_records(table, [record(ttft=0.5, token=0.1, output_tokens=11)])
    found = row(table)
    assert (found["decided"], found["errors"], found["ended"], found["seconds"]) == (1, 0, 1, 2.0)
    assert (found["first_tokens"], found["first_token_seconds"]) == (1, 0.5)
    assert (found["gaps"], found["gap_seconds"], found["answers"], found["output_tokens"]) == (10, 1.0, 1, 11)


def test_errors_lend_their_speed_to_nobody_and_a_client_that_gave_up_counts_with_its_wait() -> None:
    table: Table = {}
    add_records(table, [record(outcome="error"), record(outcome="cancelled", latency=30.0)])
    found = row(table)
    assert (found["decided"], found["errors"], found["ended"], found["seconds"]) == (1, 1, 1, 30.0)


def test_a_refusal_of_the_engine_is_no_error_and_counts_apart() -> None:
    table: Table = {}
    add_records(table, [record(outcome="engine_4xx"), record(), record(outcome="error")])
    found = row(table)
    assert (found["decided"], found["errors"], found["answered"], found["refused"]) == (2, 1, 3, 1)


def test_what_hangs_counts_by_its_age_and_only_in_the_copy() -> None:
    table: Table = {}
    add_records(table, [record()])
    seen = with_in_flight(table, [(2, user("ann"), 40.0), (2, user("bob"), 10.0), (1, user("bob"), 99.0)], version=2)
    assert (row(seen)["unfinished"], row(seen)["unfinished_seconds"]) == (1, 40.0)
    assert row(seen, "bob")["unfinished_seconds"] == 10.0
    assert row(table)["unfinished"] == 0
    names = [f"user-{number}" for number in range(100)]
    hanging = with_in_flight({}, [(2, user(name), 40.0) for name in names], version=2)
    sample = make_sample(hanging, {}, {}, 99, SALT)
    assert sample.sums_MK[ROW["request"]].sum() == 40.0 * sample.counts_MK[ROW["request"]].sum()


@given(st.text(max_size=20), st.integers(1, 99))
def test_a_key_is_on_the_side_to_which_the_router_sends_it(name: str, weight: int) -> None:
    versions = {1: VersionSplit(100 - weight, None, "demo"), 2: VersionSplit(weight, None, "demo")}
    chosen = choose(ModelSplit("demo", 1, 2, 0, versions, salt=SALT), key_digest("demo", name))
    assert is_canary_user(user(name), weight, SALT) == (chosen == 2)


def test_rescues_and_testers_move_nobody_to_the_other_side() -> None:
    names = [f"user-{number}" for number in range(200)]
    everybody: Table = {}
    add_records(everybody, [record(name) for name in names])
    sample = make_sample(everybody, everybody, {}, 30, SALT)  # as if each had been answered by both
    assert sample.is_canary is not None
    assert sample.is_canary.sum() == sum(is_canary_user(user(name), 30, SALT) for name in names)
    assert len(sample.is_canary) == len(names)


def test_each_key_has_its_own_past_and_a_new_one_has_none() -> None:
    now: Table = {}
    past: Table = {}
    add_records(now, [record("ann"), record("bob")])
    add_records(past, [record("ann", latency=7.0)])
    sample = make_sample(now, {}, past, 100, SALT)
    assert sample.is_canary is None
    assert sample.past_sums_MK[ROW["request"]].tolist() == [7.0, 0.0]
    assert sample.past_counts_MK[ROW["request"]].tolist() == [1.0, 0.0]


def test_no_keys_make_an_empty_sample() -> None:
    sample = make_sample({}, {}, {}, 50, SALT)
    assert sample.sums_MK.shape == (len(METRICS), 0)
    assert np.array(sample.is_canary).shape == (0,)


def test_a_table_comes_back_from_a_file_and_another_form_is_refused() -> None:
    table: Table = {}
    add_records(table, [record("ann"), record("bob", outcome="error")])
    assert checked_table(table) == table
    for other in ({"xyz": [0.0] * len(FIELDS)}, {user("ann"): [1.0]}, {user("ann"): ["x"] * len(FIELDS)}):
        with pytest.raises(ValueError):
            checked_table(other)


def test_one_name_of_two_tenants_is_two_users_and_the_sample_knows_whose_each_is() -> None:
    table: Table = {}
    add_records(table, [record("ann", tenant=1), record("bob", tenant=1), record("ann", tenant=2)])
    sample = make_sample(table, {}, {}, 100, SALT)
    assert sample.tenant_K is not None
    assert sorted(np.unique(sample.tenant_K, return_counts=True)[1].tolist()) == [1, 2]


def test_one_tenants_invented_names_fill_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sticky_keys, "MAX_USERS_OF_TENANT", 50)
    table: Table = {}
    for part in range(4):
        add_records(table, [record(f"invented-{part}-{number}", tenant=1) for number in range(40)])
    add_records(table, [record("ann", tenant=2), record("invented-0-0", tenant=1)])
    assert len(table) == 51
    assert row(table, "invented-0-0")["decided"] == 2
