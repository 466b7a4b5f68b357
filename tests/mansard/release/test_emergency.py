"""Rollback with the journal's database down: a local file in a higher term, and what comes of it when that is back."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mansard.errors import BadInput, Conflict, Corrupt, JournalDown, MansardError
from mansard.records import Registration
from mansard.release import emergency, oncall, oncall_text
from mansard.release.events import ABORTED, EMERGENCY, ROLLED_BACK, Entry, Pointers, Uptime, as_text, utc_now
from mansard.release.journal import Journal
from mansard.release.memory import recall, remember
from mansard.release.permission import guard_of
from mansard.release.pointer import recent_move
from mansard.serving import split as splits
from mansard.site import Site, load_site
from tests.mansard.release.outage import Outage, roll_back, state

Make = Callable[..., Registration]
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(params=["sqlite", "postgresql"])
def outage(request: pytest.FixtureRequest, site: Site) -> Iterator[Outage]:
    """Its site has a journal of the parameter's kind; a server runs again afterwards."""
    server = None
    if request.param == "postgresql":
        server = request.getfixturevalue("postgres")
        text = site.path.read_text().replace("home: .\n", f"home: .\njournal: {server.new_journal()!r}\n")
        site.path.write_text(text)
    yield Outage(load_site(site.path), server)
    if server is not None:
        server.stop()
        server.start()


@pytest.fixture
def site_of_three(outage: Outage, candidate: Make) -> Site:
    """Three versions were stable, one after the other; the host has written down where the journal stands."""
    site, split = outage.site, splits.Split()
    with Journal.open(site.journal) as journal:
        for version, name in enumerate(("one", "two", "three"), 1):
            journal.register(candidate(name), None)
            journal.start_rollout("demo", version, "otto", "", journal.pointers("demo"))
            journal.promote("demo", version, "host", "", journal.pointers("demo"))
            split = splits.with_stable(split, "demo", version, f"http://127.0.0.1:810{version}", "demo", journal.term())
        remember(site, journal)
    splits.write_split(site.split_file, split)
    return site


def imported(site: Site) -> list[Entry]:
    with Journal.open(site.journal) as journal:
        emergency.import_waiting(site, journal)
        return [e for e in journal.entries("demo") if e.body.get("facts", {}).get("emergency")]


def test_a_rollback_moves_users_in_a_higher_term_and_the_journal_later(outage: Outage, site_of_three: Site) -> None:
    site = site_of_three
    outage.begin()
    done = roll_back(site, why="bad answers")
    assert (done["changed"], done["stable"], done["previous"], done["term"]) == (True, 2, 1, 1006)
    assert "journal" in done["journal"]
    split = splits.read_split(site.split_file)
    assert (split.term, split.models["demo"].stable, split.models["demo"].canary) == (1006, 2, None)
    told = oncall.status(site, "demo")
    assert (told["stable"]["version"], told["split"]["agrees"], told["emergency"]["waiting"][0]["to"]) == (2, True, 2)
    text = oncall_text.status_text(told)
    assert "journal: DOWN: journal" in text and "emergency, waits for the journal: " in text
    with pytest.raises(JournalDown):
        oncall.history(site, "demo")
    assert oncall.remembered_history(site, "demo")[-1]["why"] == "bad answers"
    outage.end()
    assert [e["kind"] for e in oncall.history(site, "demo")][-1] == "rolled_back"  # still waiting, shown already
    [entry] = imported(site)
    assert (entry.kind, entry.who, entry.why, entry.body["to"]) == (ROLLED_BACK, "otto", "bad answers", 2)
    assert "conflict" not in entry.body["facts"]
    assert state(site) == (Pointers(2, None, 1, 1006), 2, None)
    assert not site.emergency_file.exists()
    assert "(emergency)" in oncall_text.history_text(oncall.history(site, "demo"))


def test_a_running_rollout_is_aborted_and_stable_stays(outage: Outage, site_of_three: Site, candidate: Make) -> None:
    site = site_of_three
    with Journal.open(site.journal) as journal:
        journal.register(candidate("four"), None)
        journal.start_rollout("demo", 4, "otto", "", journal.pointers("demo"))
        remember(site, journal)
        term = journal.step("demo", 4, 25, "host", "", journal.pointers("demo"))
    split = splits.with_canary(splits.read_split(site.split_file), "demo", 4, "http://127.0.0.1:8104", "demo", 25, term)
    splits.write_split(site.split_file, split)
    outage.begin()
    done = roll_back(site)
    assert (done["action"], done["stable"], done["canary"]) == ("abort", 3, None)
    outage.end()
    assert [e.kind for e in imported(site)] == [ABORTED]
    assert state(site) == (Pointers(3, None, 2, done["term"]), 3, None)


def test_decision_10s_rules_hold_between_operators(outage: Outage, site_of_three: Site) -> None:
    site = site_of_three
    outage.begin()
    assert roll_back(site, who="ada")["stable"] == 2
    again = roll_back(site, who="grace")
    assert (again["changed"], again["stable"]) == (False, 2)
    assert "ada rolled back from 3 to 2" in again["message"]
    assert roll_back(site, from_version=3, who="grace")["changed"] is False
    assert roll_back(site, from_version=2, who="grace")["stable"] == 1
    with pytest.raises(Conflict, match=r"nothing to go back to.*as far as this machine remembers"):
        roll_back(site, from_version=1)
    with pytest.raises(BadInput, match="version 9 was never stable"):
        roll_back(site, from_version=1, to=9)
    outage.end()
    assert [(e.who, e.body["to"]) for e in imported(site)] == [("ada", 2), ("grace", 1)]
    assert state(site)[0].stable == 1


def test_of_operators_at_once_one_moves(three: Site) -> None:
    with Journal.open(three.journal) as journal:
        remember(three, journal)
    Outage(three, None).begin()
    code = """
import sys
from pathlib import Path
from mansard.release.direct_rollback import Request, rollback_directly
from mansard.serving.host.when_down import follow_pointers
from mansard.site import load_site
site = load_site(Path(sys.argv[1]))
sys.stdin.readline()
asked = Request("demo", None, None, False, sys.argv[2], "")
told = rollback_directly(site, asked, lambda *_: True, lambda *where: follow_pointers(site, *where), lambda *_: [])
print(told["changed"], told["stable"])
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(three.path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for name in ("ada", "grace", "otto")
    ]
    for process in processes:
        assert process.stdin is not None
        print("go", file=process.stdin, flush=True)
    told = sorted(p.communicate(timeout=300)[0].split() for p in processes)
    assert told == [["False", "2"], ["False", "2"], ["True", "2"]]
    assert [r.to for r in emergency.waiting(three)] == [2]


def promoted_unseen(site: Site, candidate: Make) -> None:
    """The journal promoted 4 and went down before anybody else heard of it."""
    with Journal.open(site.journal) as journal:
        journal.register(candidate("four"), None)
        journal.start_rollout("demo", 4, "otto", "", journal.pointers("demo"))
        remember(site, journal)
        journal.promote("demo", 4, "host", "", journal.pointers("demo"))


def test_a_journal_that_had_moved_unseen_follows_the_operator_and_the_conflict_is_shown(
    outage: Outage, site_of_three: Site, candidate: Make
) -> None:
    site = site_of_three
    promoted_unseen(site, candidate)
    outage.begin()
    assert roll_back(site, why="slow")["action"] == "abort"
    outage.end()
    [entry] = imported(site)
    assert (entry.kind, entry.version, entry.body["to"]) == (ROLLED_BACK, 4, 3)
    assert "saw stable 3 and canary 4, the journal had stable 4 and canary None" in entry.body["facts"]["conflict"]
    assert state(site)[:2] == (Pointers(3, None, 2, entry.body["after"]["term"]), 3)
    told = oncall.status(site, "demo")
    assert told["emergency"]["conflicts"][0]["sequence"] == entry.sequence
    assert f"emergency in CONFLICT, entry {entry.sequence} by otto" in oncall_text.status_text(told)
    assert "CONFLICT" in oncall_text.history_text(oncall.history(site, "demo"))


def test_an_emergency_that_needs_no_move_any_more_still_raises_the_term(
    outage: Outage, site_of_three: Site
) -> None:
    """Another rollback had reached the journal, not the split: both want the same."""
    site = site_of_three
    with Journal.open(site.journal) as journal:
        journal.rollback("demo", 2, "ada", "", journal.pointers("demo"))
    outage.begin()
    roll_back(site)
    outage.end()
    [entry] = imported(site)
    assert (entry.kind, entry.body["after"]["stable"]) == (EMERGENCY, 2)
    assert state(site) == (Pointers(2, None, 1, 1006), 2, None)


class Killed(Exception):
    pass


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(targets=st.lists(st.integers(1, 4), min_size=1, max_size=4), unseen=st.booleans())
def test_an_import_killed_at_any_move_ends_as_one_that_was_not(
    site: Site, candidate: Make, tmp_path_factory: pytest.TempPathFactory, targets: list[int], unseen: bool
) -> None:
    def made(name: str) -> Site:
        home = tmp_path_factory.mktemp(name)
        place = replace(site, home=home)
        with Journal.open(place.journal) as journal:
            for version, word in enumerate(("one", "two", "three"), 1):
                journal.register(candidate(word), None)
                journal.start_rollout("demo", version, "otto", "", journal.pointers("demo"))
                journal.promote("demo", version, "host", "", journal.pointers("demo"))
            remember(place, journal)
        split = splits.with_stable(splits.Split(), "demo", 3, "http://127.0.0.1:8103", "demo", 6)
        splits.write_split(place.split_file, split)
        if unseen:
            promoted_unseen(place, candidate)
        outage = Outage(place, None)
        outage.begin()
        for target in targets:
            with suppress(Conflict, BadInput):
                stable = splits.read_split(place.split_file).models["demo"].stable
                roll_back(place, from_version=stable, to=target, hard=True)
        outage.end()
        return place

    whole, broken = made("whole"), made("broken")
    with Journal.open(whole.journal) as journal:
        emergency.import_waiting(whole, journal)
        told = [(e.kind, e.version, e.body.get("to")) for e in journal.entries("demo")]

    moves_left = 0
    while True:  # one move further each time

        def kill_after(*_: object, left: list[int] = [moves_left]) -> None:  # noqa: B006 - counts down in this round
            if left[0] == 0:
                raise Killed
            left[0] -= 1

        try:
            with Journal.open(broken.journal, guard=kill_after) as journal:
                emergency.import_waiting(broken, journal)
            break
        except Killed:
            moves_left = 1
    with Journal.open(broken.journal) as journal:
        assert [(e.kind, e.version, e.body.get("to")) for e in journal.entries("demo")] == told
    if targets and emergency.waiting(whole):
        raise AssertionError("nothing may wait after an import")
    assert state(broken)[0] == state(whole)[0]


def test_a_half_written_line_counts_as_never_written(outage: Outage, site_of_three: Site) -> None:
    site = site_of_three
    outage.begin()
    roll_back(site)
    whole = site.emergency_file.read_bytes()
    for length in (1, len(whole) // 2, len(whole) - 1):
        site.emergency_file.write_bytes(whole + whole[:length])
        assert len(emergency.waiting(site)) == 1
    assert roll_back(site, from_version=2)["stable"] == 1
    assert [r.number for r in emergency.waiting(site)] == [1, 2]


@pytest.mark.parametrize("change", ["who", "order", "gone", "nonsense"])
def test_changed_emergency_entries_are_corrupt_and_stay(three: Site, change: str) -> None:
    with Journal.open(three.journal) as journal:
        remember(three, journal)
    outage = Outage(three, None)
    outage.begin()
    roll_back(three)
    roll_back(three, from_version=2)
    outage.end()
    first, second = three.emergency_file.read_bytes().splitlines(keepends=True)
    lines = {
        "who": [first.replace(b'"otto"', b'"ada"'), second],
        "order": [second, first],
        "gone": [second],
        "nonsense": [first, b"{}\n"],
    }[change]
    three.emergency_file.write_bytes(b"".join(lines))
    before = three.emergency_file.read_bytes()
    with Journal.open(three.journal) as journal, pytest.raises(Corrupt, match=r"emergency\.jsonl"):
        emergency.import_waiting(three, journal)
    assert three.emergency_file.read_bytes() == before
    assert "emergency entries: " in oncall_text.status_text(oncall.status(three, "demo"))


def test_a_target_without_an_engine_or_whole_artifact_moves_only_with_hard(
    outage: Outage, site_of_three: Site
) -> None:
    site = site_of_three
    artifact = recall(site).models["demo"].artifacts[2]
    outage.begin()
    with pytest.raises(MansardError, match="has no engine that answers"):
        roll_back(site, dead=(2,))
    (site.store / "manifests" / artifact).unlink()
    with pytest.raises(Corrupt, match="is not whole"):
        roll_back(site)
    assert not emergency.waiting(site)
    done = roll_back(site, hard=True, dead=(2,))
    assert (done["stable"], len(done["warnings"])) == (2, 3)


def test_without_a_memory_the_split_still_lets_a_canary_be_aborted(three: Site, candidate: Make) -> None:
    with Journal.open(three.journal) as journal:
        journal.register(candidate("four"), None)
        journal.start_rollout("demo", 4, "otto", "", journal.pointers("demo"))
        term = journal.step("demo", 4, 25, "host", "", journal.pointers("demo"))
    split = splits.with_canary(splits.read_split(three.split_file), "demo", 4, "http://127.0.0.1:1", "demo", 25, term)
    splits.write_split(three.split_file, split)
    outage = Outage(three, None)
    outage.begin()
    for damage in (None, "{", '{"format": 2}'):
        if damage is not None:
            three.memory_file.write_text(damage)
        done = roll_back(three, from_version=4)
        assert done["stable"] == 3
    with pytest.raises(Conflict, match="nothing to go back to"):
        roll_back(three, from_version=3)
    outage.end()
    assert [e.kind for e in imported(three)] == [ABORTED]


def test_a_damaged_journal_is_worked_around_too(three: Site) -> None:
    with Journal.open(three.journal) as journal:
        remember(three, journal)
    for path in three.home.glob("journal.sqlite3*"):
        path.unlink()
    (three.home / "journal.sqlite3").write_text("not a database. " * 500)
    done = roll_back(three)
    assert (done["stable"], "not a database" in done["journal"]) == (2, True)


def test_a_stale_controller_moves_nothing_forward(outage: Outage, site_of_three: Site, candidate: Make) -> None:
    """It hung through the outage and believes in the pointers and the term that it saw before."""
    site = site_of_three
    with Journal.open(site.journal) as journal:
        journal.register(candidate("four"), None)
        journal.start_rollout("demo", 4, "otto", "", journal.pointers("demo"))
        old, old_term = journal.pointers("demo"), journal.term()
        remember(site, journal)
    outage.begin()
    roll_back(site, from_version=4)
    outage.end()
    with Journal.open(site.journal, guard=guard_of(site.path)) as stale:
        with pytest.raises(Conflict, match=r"emergency entries .* wait for their import"):
            stale.promote("demo", 4, "host", "", old)
        emergency.import_waiting(site, stale)
        with pytest.raises(Conflict, match="the pointers moved meanwhile"):
            stale.promote("demo", 4, "host", "", old)
    late = splits.with_stable(splits.read_split(site.split_file), "demo", 4, "http://127.0.0.1:8104", "demo", old_term)
    with pytest.raises(Conflict, match="is not newer"):
        splits.write_split(site.split_file, late)
    assert state(site)[:2] == (Pointers(3, None, 2, 1007), 3)


def test_a_clock_that_jumps_neither_hides_nor_prolongs_a_recent_rollback() -> None:
    now = utc_now()
    body = {"version": 3, "to": 2, "uptime": {"boot": "a", "seconds": 1000.0}}
    entry = Entry(1, "demo", ROLLED_BACK, as_text(now), "ada", "", body, "", "")
    for jump in (timedelta(hours=-3), timedelta(0), timedelta(hours=3)):
        assert recent_move([entry], "demo", now + jump, Uptime("a", 1599.0)) == entry
        assert recent_move([entry], "demo", now + jump, Uptime("a", 1600.0)) is None
    # Of another boot: the clock decides.
    assert recent_move([entry], "demo", now + timedelta(minutes=9), Uptime("b", 5.0)) == entry
    assert recent_move([entry], "demo", now + timedelta(minutes=11), Uptime("b", 5.0)) is None


def test_the_journals_order_does_not_depend_on_its_clock(tmp_path: Path, candidate: Make) -> None:
    moments = iter([utc_now() + timedelta(hours=h) for h in (0, 5, -5, 2, -1, 0)])
    with Journal.open(tmp_path / "j", clock=lambda: next(moments)) as journal:
        for name in ("one", "two"):
            version = journal.register(candidate(name), None)
            journal.start_rollout("demo", version, "otto", "", journal.pointers("demo"))
            journal.promote("demo", version, "host", "", journal.pointers("demo"))
        assert journal.pointers("demo") == Pointers(2, None, 1, 4)
        journal.verify()


def test_what_waits_is_json_that_a_person_can_read(three: Site) -> None:
    Outage(three, None).begin()
    roll_back(three, from_version=3, to=3)
    assert not three.emergency_file.exists()
    assert json.loads(json.dumps(oncall.status(three, "demo")))["journal"]["problem"]
