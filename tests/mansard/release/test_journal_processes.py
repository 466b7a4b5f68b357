"""Many processes on one journal, and processes that are killed."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Thread

import psycopg
import pytest

from mansard.release.journal import Journal
from tests.mansard.release.journals import Place, filled, plain

ROOT = Path(__file__).resolve().parents[3]


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
