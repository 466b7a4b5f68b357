"""The rules of an outage of stable: who may serve its users, what the journal takes, what a person reads."""

import math
from pathlib import Path
from typing import Any

import pytest

from mansard.errors import Conflict
from mansard.release.events import Entry, Pointers, Uptime
from mansard.release.journal import Journal
from mansard.release.outage import next_command, open_outage, outage_intervals, stand_ins
from mansard.serving import split as splits
from mansard.serving.host.outages import StableOutage, Standing, down_intervals
from mansard.serving.host.traffic import Traffic
from mansard.serving.host.when_down import follow_pointers
from mansard.site import Site

POINTERS = Pointers(stable=3, canary=None, previous=2, term=9)


def entry(sequence: int, kind: str, version: int, **body: Any) -> Entry:
    return Entry(sequence, "demo", kind, "2026-11-30T12:00:00Z", "host", "", {"version": version, **body}, "", "")


PROMOTIONS = [entry(number, "promoted", number) for number in (1, 2, 3)]


def test_previous_stands_in_first_then_earlier_stables_but_none_that_was_rejected() -> None:
    assert stand_ins(PROMOTIONS, "demo", POINTERS, 2) == [2, 1]
    assert stand_ins(PROMOTIONS, "demo", POINTERS, 1) == [2]
    rejected = [*PROMOTIONS, entry(4, "rejected", 2)]
    assert stand_ins(rejected, "demo", POINTERS, 2) == [1]
    assert stand_ins([*rejected, entry(5, "approved", 2)], "demo", POINTERS, 2) == [2, 1]


def test_an_outage_is_open_until_stable_is_up_or_another_version_is_stable() -> None:
    down = [*PROMOTIONS, entry(4, "stable_down", 3, to=None), entry(5, "stable_down", 3, to=2)]
    outage = open_outage(down, "demo")
    assert outage is not None
    assert (outage.version, outage.to, outage.first.sequence, outage.last.sequence) == (3, 2, 4, 5)
    for end in (entry(6, "stable_up", 3), entry(6, "rolled_back", 3, to=2), entry(6, "promoted", 4)):
        assert open_outage([*down, end], "demo") is None
    assert open_outage([*down, entry(6, "aborted", 4)], "demo") == outage
    assert open_outage(down, "other") is None


def test_the_journal_takes_an_outage_of_stable_alone_and_moves_nothing(three: Site) -> None:
    with Journal.open(three.journal) as journal:
        before, term, now = journal.pointers("demo"), journal.term(), Uptime("boot", 5.0)
        with pytest.raises(Conflict, match="version 3 is not down by the journal"):
            journal.stable_up("demo", "host", "", before, now)
        journal.stable_down("demo", 2, "host", "its engine ended", before, now)
        assert (journal.pointers("demo"), journal.term()) == (before, term)
        with pytest.raises(Conflict, match="cannot stand in for 3"):
            journal.stable_down("demo", 3, "host", "", before, now)
        with pytest.raises(Conflict, match="the pointers moved meanwhile"):
            journal.stable_down("demo", 2, "host", "", Pointers(stable=1), now)
        with pytest.raises(ValueError, match="use its own verb"):
            journal.append("demo", "stable_up", "host", "", {"version": 3})
        journal.stable_up("demo", "host", "", before, now)
        journal.verify()


def test_intervals_are_of_this_boot_and_of_this_version() -> None:
    def at(boot: str, seconds: float) -> dict[str, Any]:
        return {"since": {"boot": boot, "seconds": seconds}}

    entries = [
        entry(1, "stable_down", 3, to=2, **at("old", 1.0)), entry(2, "stable_up", 3, **at("old", 2.0)),
        entry(3, "stable_down", 3, to=None, **at("now", 10.0)), entry(4, "stable_down", 3, to=2, **at("now", 12.0)),
        entry(5, "stable_up", 3, **at("now", 20.0)), entry(6, "stable_down", 2, to=1, **at("now", 30.0)),
        entry(7, "stable_up", 2, **at("now", 31.0)), entry(8, "stable_down", 3, to=2, **at("now", 40.0)),
    ]  # fmt: skip
    assert outage_intervals(entries, "demo", 3, "now") == [(10.0, 20.0), (40.0, float("inf"))]


def test_an_outage_that_began_before_this_boot_lasts_from_the_beginning_until_it_ended() -> None:
    def at(boot: str, seconds: float) -> dict[str, Any]:
        return {"since": {"boot": boot, "seconds": seconds}}

    down = entry(1, "stable_down", 3, to=2, **at("old", 90_000.0))
    assert outage_intervals([down], "demo", 3, "now") == [(-math.inf, math.inf)]
    up = entry(2, "stable_up", 3, **at("now", 20.0))
    assert outage_intervals([down, up], "demo", 3, "now") == [(-math.inf, 20.0)]
    standing = Standing(POINTERS, (2,), ((-math.inf, math.inf),))
    outage = StableOutage(3, "its engine ended", since=Uptime("old", 90_000.0))
    assert down_intervals(standing, outage, "now") == [(-math.inf, math.inf)]
    assert down_intervals(standing, outage, "old") == [(-math.inf, math.inf), (90_000.0, math.inf)]


def test_the_command_names_the_version_that_is_left_and_where_nothing_is_left_the_host() -> None:
    assert next_command(3, 2, 2).startswith("mansard rollback --from 3 ")
    assert "version 2 is started if need be" in next_command(3, None, 2)
    assert next_command(1, None, None).startswith("mansard up ")


def test_a_split_remembers_who_stands_in_for_whom_and_goes_back(tmp_path: Path) -> None:
    split = splits.with_stable(splits.Split(), "demo", 1, "http://127.0.0.1:1", "demo", 1)
    split = splits.with_stable(split, "demo", 2, "http://127.0.0.1:2", "demo", 2)
    split = splits.with_canary(split, "demo", 3, "http://127.0.0.1:3", "demo", 25, 3)
    path = tmp_path / "split.json"
    splits.write_split(path, split)
    moved = splits.with_stand_in(split, "demo", 1, "http://127.0.0.1:1", "demo")
    splits.write_split(path, moved)
    model = splits.read_split(path).models["demo"]
    assert (model.stable, model.stands_in_for, model.journal_stable, model.canary) == (1, 2, 2, 3)
    assert {n: v.weight_percent for n, v in model.versions.items()} == {1: 75, 2: 0, 3: 25}
    without = splits.without_canary(moved, "demo", 4).models["demo"]
    assert (without.stable, without.stands_in_for, without.canary) == (1, 2, None)
    back = splits.with_stand_in(moved, "demo", 2, "http://127.0.0.1:2", "demo")
    splits.write_split(path, back)
    assert splits.read_split(path).models["demo"].versions == split.models["demo"].versions
    assert splits.read_split(path).models["demo"].stands_in_for is None


@pytest.mark.parametrize("has_host", [True, False])
def test_an_abort_leaves_users_with_the_version_that_stands_in(three: Site, has_host: bool) -> None:
    """Also where the host is down: stable has no engine then either."""
    split = splits.with_canary(splits.read_split(three.split_file), "demo", 4, "http://127.0.0.1:8104", "demo", 25, 10)
    split = splits.with_endpoint(split, "demo", 3, None, "demo")
    splits.write_split(three.split_file, splits.with_stand_in(split, "demo", 2, "http://127.0.0.1:8102", "demo"))
    aborted = Pointers(stable=3, canary=None, previous=2, term=11)
    for _ in range(2):
        if has_host:
            Traffic(three, lambda model, version: model).follow_pointers("demo", aborted, None, 11)
        else:
            follow_pointers(three, "demo", aborted, 11)
        after = splits.read_split(three.split_file)
        model = after.models["demo"]
        assert (after.term, model.stable, model.stands_in_for, model.canary) == (11, 2, 3, None)
        assert (model.versions[2].weight_percent, model.versions[2].endpoint) == (100, "http://127.0.0.1:8102")
