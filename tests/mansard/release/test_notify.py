"""The site's program hears of what happened, and can neither break nor delay it."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mansard.errors import BadInput
from mansard.records import Registration
from mansard.release.journal import Journal
from mansard.release.notify import notify
from mansard.serving.host.journal_watch import JournalWatch
from mansard.serving.host.notices import notice_of
from mansard.site import Site, load_site

Make = Callable[..., Registration]
PROGRAM = "import sys, pathlib; pathlib.Path(sys.argv[1]).open('a').write(sys.stdin.read())"


def heard(path: Path, number: int) -> list[dict[str, Any]]:
    pause = threading.Event()
    for _ in range(6000):
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) >= number:
            return [json.loads(line) for line in lines]
        pause.wait(0.02)
    raise AssertionError(f"waited two minutes for {number} lines in {path}")


@pytest.fixture
def telling(site: Site) -> Site:
    return replace(site, notify=(sys.executable, "-c", PROGRAM, str(site.home / "heard")))


def test_the_program_gets_one_json_object_on_its_standard_input(telling: Site) -> None:
    assert notify(telling, "rollback", "demo", "version 2 is stable again", version=3, who="otto") == ""
    [told] = heard(telling.home / "heard", 1)
    assert (told["format"], told["event"], told["model"], told["version"], told["who"]) == (
        *(1, "rollback", "demo", 3, "otto"),
    )
    assert told["text"] == "version 2 is stable again" and told["at"].endswith("Z")


@pytest.mark.parametrize("program", [("/nowhere/at-all",), ("sh", "-c", "echo broken >&2; exit 3"), ("sleep", "600")])
def test_a_program_that_is_missing_fails_or_hangs_breaks_nothing(site: Site, program: tuple[str, ...]) -> None:
    """It returns although the program has not: only the log knows what came of it."""
    site = replace(site, notify=program)
    assert notify(site, "abort", "demo", "x") == ""
    if program[0] != "sleep":
        log, pause = site.logs / "notify.log", threading.Event()
        while not log.read_text():
            pause.wait(0.02)
        assert "No such file" in log.read_text() or "broken" in log.read_text()


def test_nothing_is_called_where_the_site_names_nothing_and_a_machine_without_setsid_is_told(
    site: Site, telling: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert notify(site, "abort", "demo", "x") == ""
    assert not (site.home / "logs").exists()
    monkeypatch.setenv("PATH", "/nowhere")
    assert "was not started" in notify(telling, "abort", "demo", "x")


def test_a_notify_key_that_is_no_list_is_refused(site: Site) -> None:
    site.path.write_text(site.path.read_text() + "notify: mail -s hello\n")
    with pytest.raises(BadInput, match="notify: 'mail -s hello' is not a list"):
        load_site(site.path)


def test_the_host_tells_of_waiting_approvals_aborts_and_rollbacks_once(telling: Site, candidate: Make) -> None:
    with Journal.open(telling.journal) as journal:
        journal.append("demo", "remark", "ada", "the past is not told", {})
        JournalWatch(telling).look(journal)
        for name, verdict in (("one", "pass"), ("two", "pass"), ("bad", "fail")):
            journal.register(candidate(name, verdict=verdict), None)
        for version in (1, 2):
            journal.start_rollout("demo", version, "otto", "", journal.pointers("demo"))
            journal.promote("demo", version, "host", "", journal.pointers("demo"))
        journal.start_rollout("demo", 3, "otto", "", journal.pointers("demo"))
        journal.abort("demo", 3, "host", "its engine died", journal.pointers("demo"))
        journal.rollback("demo", 1, "otto", "slow", journal.pointers("demo"))
        for _ in range(2):  # a second host after the first
            JournalWatch(telling).look(journal)
    told = heard(telling.home / "heard", 4)
    assert sorted(t["event"] for t in told) == ["abort", "approval_waiting", "approval_waiting", "rollback"]
    texts = {t["event"]: t["text"] for t in told}
    assert "version 3 was aborted by host: its engine died" in texts["abort"]
    assert "otto rolled back from version 2 to 1: slow" in texts["rollback"]


def test_what_was_done_without_the_host_is_not_told_twice(site: Site, candidate: Make) -> None:
    with Journal.open(site.journal) as journal:
        for name in ("one", "two"):
            version = journal.register(candidate(name), None)
            journal.start_rollout("demo", version, "otto", "", journal.pointers("demo"))
            journal.promote("demo", version, "host", "", journal.pointers("demo"))
        journal.rollback("demo", 1, "otto", "", journal.pointers("demo"), {"host": "down", "hard": False})
        down = journal.entries()[-1]
    assert notice_of(down) is None
    facts = {"emergency": {"digest": "x"}, "conflict": "the operator saw another"}
    clash = notice_of(replace(down, body={**down.body, "facts": facts}))
    assert clash is not None and clash["event"] == "emergency_conflict"


def test_a_rollback_from_the_shell_tells(three: Site) -> None:
    words = [sys.executable, "-c", PROGRAM, str(three.home / "heard")]
    three.path.write_text(three.path.read_text() + f"notify: {json.dumps(words)}\n")
    command = [sys.executable, "-m", "flows.cli", "rollback", "--hard", "--as", "otto", "--model", "demo"]
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [*command, "--site", str(three.path)], cwd=root, capture_output=True, text=True, check=True, timeout=300
    )
    assert "version 2 is stable again, was 3" in done.stdout
    [told] = heard(three.home / "heard", 1)
    assert (told["event"], told["who"], told["host"]) == ("rollback", "otto", "down")
