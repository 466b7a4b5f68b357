"""The journal on both databases: numbers, moves, tampering, real concurrent processes, kills."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Thread

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mansard.errors import BadInput, Conflict, Corrupt, MansardError
from mansard.records import Registration
from mansard.release.events import GENESIS, Entry, Pointers
from mansard.release.journal import Journal
from mansard.release.pointer import rollback_target

Make = Callable[..., Registration]
Place = Path | str

ROOT = Path(__file__).resolve().parents[3]


def plain(name: str = "one", **fields: object) -> Registration:
    """A registration whose snapshots exist nowhere; the journal does not look."""
    digest = name.encode().hex().ljust(64, "0")
    made = Registration(
        *("demo", digest, digest, "pass", digest, digest, (("bits", digest),), 1, 1, 1, "ada", "demo", digest),
        serve={"dtype": "bfloat16"},
        release={"steps": [{"bake_seconds": 0.5}]},
        stages=(("quantize", digest, digest),),
    )
    return replace(made, **fields)  # type: ignore[arg-type]


def release(journal: Journal, version: int) -> None:
    journal.start_rollout("demo", version, "ada", "", journal.pointers("demo"))
    journal.step("demo", version, 50, "host", "", journal.pointers("demo"), {"step": 1, "steps": 2})
    journal.promote("demo", version, "host", "all steps pass", journal.pointers("demo"))


def filled(place: Place) -> Journal:
    """Two versions released, one rolled back, one aborted."""
    journal = Journal.open(place)
    for name in ("one", "two", "three"):
        journal.register(plain(name), None)
    release(journal, 1)
    release(journal, 2)
    journal.rollback("demo", 1, "ada", "bad answers", journal.pointers("demo"))
    journal.start_rollout("demo", 3, "ada", "", journal.pointers("demo"))
    journal.abort("demo", 3, "host", "dead engine", journal.pointers("demo"))
    return journal


@pytest.fixture
def journal(place: Place) -> Iterator[Journal]:
    with Journal.open(place) as opened:
        yield opened


def test_equal_registrations_are_one_version_and_others_count_up(journal: Journal, candidate: Make) -> None:
    assert journal.register(candidate("one"), "aa") == 1
    assert journal.register(candidate("two"), None) == 2
    assert journal.register(candidate("one"), "bb") == 1
    assert journal.register(candidate("one", model_name="other"), None) == 1
    assert journal.versions("demo") == [1, 2]
    assert journal.registration("demo", 1) == candidate("one")
    assert (journal.signature("demo", 1), journal.signature("demo", 2)) == ("aa", None)
    assert [e.kind for e in journal.entries()] == ["registered"] * 3
    with pytest.raises(BadInput, match="demo has no version 9; registered are: 1, 2"):
        journal.registration("demo", 9)


def test_find_knows_what_a_spec_made_whatever_the_baseline_was(journal: Journal) -> None:
    journal.register(plain("one"), None)
    journal.register(plain("two"), None)
    one = plain("one", baseline_version=2, verdict="fail")
    assert journal.find("demo", one.artifact, one.spec_digest) == 1
    assert journal.find("other", one.artifact, one.spec_digest) is None
    assert journal.find("demo", one.artifact, "0" * 64) is None


def test_a_version_judged_again_has_the_new_verdict(journal: Journal) -> None:
    journal.register(plain("one"), "aa")
    again = plain("one", verdict="fail", baseline_version=4, verdict_record="e" * 64, item_records=(("b", "f" * 64),))
    journal.judge(1, again, "bb", "ada", "the baseline moved")
    assert journal.registration("demo", 1) == again
    assert journal.signature("demo", 1) == "bb"
    assert journal.register(plain("one"), None) == 1
    with pytest.raises(BadInput, match="may not change the candidate"):
        journal.judge(1, plain("two"), None, "ada", "")
    with pytest.raises(BadInput, match="no version 2"):
        journal.judge(2, again, None, "ada", "")
    journal.verify()


def test_a_version_judged_again_was_measured_beside_the_new_baseline(journal: Journal) -> None:
    made = ("quantize", "7" * 64, "8" * 64)
    journal.register(plain("one", stages=(made, ("cost", "1" * 64, "2" * 64))), "aa")
    again = plain("one", baseline_version=4, stages=(made, ("cost", "3" * 64, "4" * 64)))
    journal.judge(1, again, "bb", "ada", "the baseline moved")
    assert journal.registration("demo", 1) == again
    with pytest.raises(BadInput, match="may not change the candidate"):
        journal.judge(1, plain("one", stages=(("quantize", "9" * 64, "8" * 64),)), None, "ada", "")


def test_pointers_follow_the_moves_and_terms_grow(place: Place) -> None:
    with filled(place) as journal:
        assert journal.pointers("demo") == Pointers(stable=1, canary=None, previous=None, term=9)
        assert journal.term() == 9
        assert journal.pointers("other") == Pointers()
        terms = [e.body["after"]["term"] for e in journal.entries("demo") if "after" in e.body]
        assert terms == list(range(1, 10))
        step = journal.entries("demo", kinds=("canary_step",))[0]
        assert step.body == {
            "version": 1,
            "weight_percent": 50,
            "facts": {"step": 1, "steps": 2},
            "before": {"stable": None, "canary": 1, "previous": None, "term": 1},
            "after": {"stable": None, "canary": 1, "previous": None, "term": 2},
        }
        journal.verify()


def test_terms_are_global_and_pointers_are_per_model(journal: Journal) -> None:
    journal.register(plain("one"), None)
    journal.register(plain("one", model_name="other"), None)
    assert journal.start_rollout("demo", 1, "ada", "", Pointers()) == 1
    assert journal.start_rollout("other", 1, "ada", "", Pointers()) == 2
    assert journal.promote("demo", 1, "ada", "", Pointers(canary=1, term=1)) == 3
    assert journal.pointers("demo") == Pointers(stable=1, term=3)
    assert journal.pointers("other") == Pointers(canary=1, term=2)
    journal.verify()


def test_a_move_from_other_pointers_than_expected_changes_nothing(journal: Journal) -> None:
    journal.register(plain("one"), None)
    journal.register(plain("two"), None)
    journal.start_rollout("demo", 1, "ada", "", Pointers())
    before = journal.entries()
    late = Pointers(canary=1, term=0)
    for move in (journal.start_rollout, journal.promote, journal.abort):
        with pytest.raises(Conflict, match="the pointers moved meanwhile"):
            move("demo", 1, "ada", "", late)
    with pytest.raises(Conflict, match="the pointers moved meanwhile"):
        journal.step("demo", 1, 5, "ada", "", late)
    assert journal.entries() == before
    assert journal.term() == 1


def test_one_rollout_per_model_and_only_of_registered_versions(journal: Journal) -> None:
    journal.register(plain("one"), None)
    journal.register(plain("two"), None)
    with pytest.raises(BadInput, match="no version 7"):
        journal.start_rollout("demo", 7, "ada", "", Pointers())
    journal.start_rollout("demo", 1, "ada", "", Pointers())
    with pytest.raises(Conflict, match="a rollout of version 1 runs"):
        journal.start_rollout("demo", 2, "ada", "", journal.pointers("demo"))
    with pytest.raises(Conflict, match="no rollout of version 2 runs"):
        journal.promote("demo", 2, "ada", "", journal.pointers("demo"))
    journal.promote("demo", 1, "ada", "", journal.pointers("demo"))
    with pytest.raises(Conflict, match="stable already"):
        journal.start_rollout("demo", 1, "ada", "", journal.pointers("demo"))
    with pytest.raises(BadInput, match="never stable"):
        journal.rollback("demo", 2, "ada", "", journal.pointers("demo"))
    journal.verify()


def test_entries_that_change_more_have_their_own_verbs(journal: Journal) -> None:
    for kind in ("promoted", "registered", "judged", "rolled_back"):
        with pytest.raises(ValueError, match="its own verb"):
            journal.append("demo", kind, "ada", "", {})
    for value in (float("nan"), object(), {1: 0, "b": 0}):
        with pytest.raises(BadInput, match="not JSON"):
            journal.append("demo", "approved", "ada", "", {"value": value})
    with pytest.raises(BadInput, match="not JSON"):
        journal.append("demo", "approved", "ada", "\udcff", {})
    journal.append("demo", "approved", "ada", "", {"a": {2: 1, 10: (1, 2)}, "b": "ä"})
    journal.verify()
    assert journal.entries()[0].body == {"a": {"2": 1, "10": [1, 2]}, "b": "ä"}


def test_a_journal_opened_again_goes_on(place: Place) -> None:
    with filled(place) as journal:
        entries = journal.entries()
    with Journal.open(place) as again:
        assert again.entries() == entries
        assert again.tip() == entries[-1]
        assert again.entries(after=3) == entries[3:]
        assert again.register(plain("four"), None) == 4
        assert again.tip().previous_digest == entries[-1].digest  # type: ignore[union-attr]
        again.verify()


def test_threads_share_one_journal(journal: Journal) -> None:
    def register(start: int) -> None:
        for number in range(start, start + 10):
            journal.register(plain(f"number {number}"), None)

    threads = [Thread(target=register, args=(start,)) for start in (0, 5, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert journal.versions("demo") == list(range(1, 21))
    journal.verify()


def test_entries_can_be_neither_changed_nor_deleted_through_sql(place: Place) -> None:
    filled(place).close()
    for table in ("journal", "versions"):
        for statement in (f"UPDATE {table} SET model = 'x'", f"DELETE FROM {table}"):
            with pytest.raises((sqlite3.IntegrityError, psycopg.errors.RaiseException), match="append-only"):
                change(place, statement)
    if isinstance(place, str):
        with pytest.raises(psycopg.errors.RaiseException, match="append-only"):
            change(place, "TRUNCATE journal CASCADE")


def change(place: Place, *statements: str) -> None:
    """What somebody types into the database."""
    with closing(sqlite3.connect(place) if isinstance(place, Path) else psycopg.connect(place)) as raw:
        for statement in statements:
            raw.execute(statement)  # type: ignore[arg-type]
        raw.commit()


def tamper(place: Place, *statements: str) -> None:
    """Change the database behind the journal's back, as its owner can."""
    if isinstance(place, str):
        change(place, "SET session_replication_role = replica", *statements)
        return
    with closing(sqlite3.connect(place)) as raw:
        triggers = [name for (name,) in raw.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'")]
    change(place, *(f"DROP TRIGGER {name}" for name in triggers), *statements)


@pytest.mark.parametrize("column", ["model", "kind", "at", "who", "why", "previous_digest", "digest"])
def test_an_edited_entry_is_named(place: Place, column: str) -> None:
    filled(place).close()
    tamper(place, f"UPDATE journal SET {column} = {column} || '0' WHERE sequence = 5")
    with Journal.open(place) as journal, pytest.raises(Corrupt, match=r"entry 5 .* was changed"):
        journal.verify()


def test_an_edited_body_is_named(place: Place) -> None:
    filled(place).close()
    tamper(place, "UPDATE journal SET body = replace(body, ':50', ':60') WHERE sequence = 8")
    with Journal.open(place) as journal, pytest.raises(Corrupt, match=r"entry 8 .* was changed"):
        journal.verify()
    tamper(place, "UPDATE journal SET body = 'oops' WHERE sequence = 8")
    with Journal.open(place) as journal, pytest.raises(Corrupt, match="entry 8: its body is not JSON"):
        journal.verify()


def test_removed_and_reordered_entries_are_named(new_place: Callable[[], Place]) -> None:
    first, second = new_place(), new_place()
    filled(first).close()
    tamper(first, "DELETE FROM journal WHERE sequence = 6")
    with Journal.open(first) as journal, pytest.raises(Corrupt, match="entry 6 is missing"):
        journal.verify()
    filled(second).close()
    swap = ("= -1 WHERE sequence = 7", "= 7 WHERE sequence = 8", "= 8 WHERE sequence = -1")
    tamper(second, *(f"UPDATE journal SET sequence {s}" for s in swap))
    with Journal.open(second) as journal, pytest.raises(Corrupt, match=r"entry 7 .* was changed"):
        journal.verify()


def test_an_entry_forged_with_a_right_digest_breaks_the_chain(place: Place) -> None:
    with filled(place) as journal:
        fourth = journal.entries()[3]
    forged = replace(fourth, who="mallory")
    digest = forged.computed_digest()
    tamper(place, f"UPDATE journal SET who = 'mallory', digest = '{digest}' WHERE sequence = 4")
    with Journal.open(place) as journal, pytest.raises(Corrupt, match="entry 5 does not follow entry 4"):
        journal.verify()


def test_a_cut_off_tail_and_moved_pointers_are_found(new_place: Callable[[], Place]) -> None:
    for statement in (
        "DELETE FROM journal WHERE sequence >= 11",
        "UPDATE pointers SET stable = 3",
        "UPDATE term SET number = 3",
    ):
        place = new_place()
        filled(place).close()
        tamper(place, statement)
        with Journal.open(place) as journal, pytest.raises(Corrupt, match="the entries say"):
            journal.verify()
    place = new_place()
    filled(place).close()
    tamper(place, "UPDATE versions SET version = 9 WHERE version = 3")
    with Journal.open(place) as journal, pytest.raises(Corrupt, match="versions table"):
        journal.verify()


def test_a_newer_format_and_a_file_that_is_no_journal_are_refused(place: Place, tmp_path: Path) -> None:
    filled(place).close()
    tamper(place, "UPDATE meta SET value = '2' WHERE name = 'format'")
    with pytest.raises(MansardError, match="format 2, this Mansard reads up to 1"):
        Journal.open(place)
    (tmp_path / "text").write_text("not a database, but long enough to be looked at. " * 100)
    with pytest.raises(Corrupt, match="not a database"):
        Journal.open(tmp_path / "text")
    with pytest.raises(MansardError, match="journal"):
        Journal.open(tmp_path / "text" / "below")


def python(code: str, *arguments: str) -> "subprocess.Popen[str]":
    """A real process that has `journal` open and says when it is ready."""
    prelude = "import sys, os; from pathlib import Path; from mansard.release.journal import Journal\n"
    prelude += "place = sys.argv[1] if '://' in sys.argv[1] else Path(sys.argv[1])\n"
    return subprocess.Popen(
        [sys.executable, "-c", prelude + code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def lines_of(processes: "list[subprocess.Popen[str]]") -> list[list[str]]:
    outputs = [p.communicate(timeout=300)[0].splitlines() for p in processes]
    assert [p.returncode for p in processes] == [0] * len(processes)
    return outputs


def test_processes_that_register_at_once_agree_on_numbers(place: Place) -> None:
    """Also the first opening is a race: nobody made the database before."""
    code = """
import json
from mansard.records import Registration
content = json.loads(sys.argv[2])
with Journal.open(place) as journal:
    for number in range(12):
        made = Registration.from_json({**content, "spec_name": f"number {number}"})
        print(number, journal.register(made, None), flush=True)
"""
    content = json.dumps(plain().as_json())
    outputs = lines_of([python(code, str(place), content) for _ in range(3)])
    assert outputs[0] == outputs[1] == outputs[2]
    with Journal.open(place) as journal:
        assert journal.versions("demo") == list(range(1, 13))
        assert len(journal.entries()) == 12
        journal.verify()


def test_of_processes_that_move_a_pointer_at_once_exactly_one_wins(place: Place) -> None:
    with Journal.open(place) as journal:
        for number in range(4):
            journal.register(plain(f"number {number}"), None)
    code = """
from mansard.errors import Conflict
journal, version = Journal.open(place), int(sys.argv[2])
for _ in range(25):
    sys.stdin.readline()
    seen = journal.pointers("demo")
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        print(journal.start_rollout("demo", version, "ada", "", seen), flush=True)
    except Conflict:
        print("lost", flush=True)
"""
    processes = [python(code, str(place), str(v)) for v in (1, 2, 3)]

    def tell_all() -> list[str]:
        for process in processes:
            assert process.stdin is not None
            print("go", file=process.stdin, flush=True)
        return [(p.stdout or sys.stdin).readline().strip() for p in processes]

    won = []
    with Journal.open(place) as journal:
        for _ in range(25):
            assert tell_all() == ["ready"] * 3
            answers = tell_all()
            assert sorted(answers).count("lost") == 2, answers
            won += [int(a) for a in answers if a != "lost"]
            winner = journal.pointers("demo").canary
            assert winner is not None
            won.append(journal.abort("demo", winner, "host", "", journal.pointers("demo")))
        journal.verify()
    lines_of(processes)
    assert won == list(range(1, 51))


@pytest.mark.parametrize("round_number", range(4))
def test_a_process_killed_at_any_moment_leaves_a_whole_journal(place: Place, round_number: int) -> None:
    with Journal.open(place) as journal:
        journal.register(plain(), None)
    code = """
journal = Journal.open(place)
while True:
    pointers = journal.pointers("demo")
    move = journal.abort if pointers.canary else journal.start_rollout
    print(move("demo", 1, "ada", "", pointers), flush=True)
"""
    process = python(code, str(place))
    assert process.stdout is not None
    told = [int(process.stdout.readline()) for _ in range(15 + round_number)]
    process.send_signal(signal.SIGKILL)
    told += [int(line) for line in process.stdout.read().splitlines()]
    process.communicate(timeout=60)
    with Journal.open(place) as journal:
        journal.verify()
        assert journal.term() in (told[-1], told[-1] + 1)
        assert journal.pointers("demo").term == journal.term()
        version = journal.pointers("demo").canary
        if version is None:
            journal.start_rollout("demo", 1, "ada", "", journal.pointers("demo"))
        journal.verify()


def test_a_process_killed_inside_a_transaction_changed_nothing(place: Place) -> None:
    """The kill comes after pointers and term were written, before the entry: neither is there afterwards."""
    with filled(place) as journal:
        before, pointers = journal.entries(), journal.pointers("demo")
    code = """
from mansard.release.ledger import Ledger
class Dying(Ledger):
    def append(self, *arguments, **named):
        assert opened.term() == 10
        print("swapped", flush=True)
        os.kill(os.getpid(), 9)
opened = Journal.open(place)
opened._ledger = Dying(opened._ledger._database, opened._ledger._clock)
opened.start_rollout("demo", 2, "ada", "", opened.pointers("demo"))
"""
    process = python(code, str(place))
    output, _ = process.communicate(timeout=300)
    assert (output, process.returncode) == ("swapped\n", -signal.SIGKILL)
    with Journal.open(place) as journal:
        assert journal.entries() == before
        assert journal.pointers("demo") == pointers
        journal.verify()
        assert journal.start_rollout("demo", 2, "ada", "", pointers) == 10


@contextmanager
def other_writer(place: Place) -> Iterator[None]:
    """Another connection's open transaction."""
    if isinstance(place, Path):
        with closing(sqlite3.connect(place, isolation_level=None)) as raw:
            raw.execute("BEGIN IMMEDIATE")
            yield
            raw.execute("COMMIT")
    else:
        with psycopg.connect(place) as connection:
            connection.execute("LOCK TABLE journal IN SHARE ROW EXCLUSIVE MODE")
            yield


def test_a_writer_waits_for_another_one(place: Place) -> None:
    journal = filled(place)
    with other_writer(place):
        writer = Thread(target=journal.register, args=(plain("waited"), None))
        writer.start()
        with Journal.open(place) as reader:
            assert reader.versions("demo") == [1, 2, 3]
    writer.join(timeout=60)
    assert journal.versions("demo") == [1, 2, 3, 4]
    journal.close()


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from(["start", "step", "promote", "abort", "back"]), st.integers(1, 4))))
def test_any_sequence_of_commands_leaves_a_journal_that_verifies(
    new_place: Callable[[], Place], commands: list[tuple[str, int]]
) -> None:
    with Journal.open(new_place()) as journal:
        for number in range(4):
            journal.register(plain(f"number {number}"), None)
        for verb, version in commands:
            pointers, entries = journal.pointers("demo"), journal.entries()
            try:
                if verb == "start":
                    term = journal.start_rollout("demo", version, "ada", "", pointers)
                elif verb == "step":
                    term = journal.step("demo", version, 10, "ada", "", pointers)
                elif verb == "promote":
                    term = journal.promote("demo", version, "ada", "", pointers)
                elif verb == "abort":
                    term = journal.abort("demo", version, "ada", "", pointers)
                else:
                    to = rollback_target(entries, "demo")
                    term = journal.rollback("demo", to, "ada", "", pointers)
            except Conflict:
                assert journal.entries() == entries
                assert journal.pointers("demo") == pointers
            else:
                assert term == journal.term() == journal.pointers("demo").term == pointers.term + 1
        journal.verify()


def test_the_first_entry_follows_the_genesis_digest(journal: Journal) -> None:
    journal.register(plain(), None)
    first: Entry = journal.entries()[0]
    assert (first.sequence, first.previous_digest) == (1, GENESIS)
    assert first.digest == first.computed_digest()
