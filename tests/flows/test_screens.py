"""What the verbs print on a site that is finished: on terminals of any width, to readers that went away, to nobody."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mansard.site import Site
from tests.flows.finished_site import finished_site
from tests.terminal import Shown, run_in_terminal

READING = (
    ("status",), ("history",), ("why", "2"), ("why", "3"), ("review", "1"), ("review", "2"), ("review", "3"),
    ("verify",), ("verify", "--journal"), ("pin",), ("collect", "--dry-run"), ("rollback", "--as", "grace"),
    ("approve", "2", "--as", "grace", "--reason", "the drill went well, and nobody saw a single answer fail all week"),
    ("reject", "2", "--as", "grace", "--reason", "on second thoughts"),
)  # fmt: skip
EVERY_VERB = """
import json, sys
from flows.cli import main
site, *more = sys.argv[2:]
statuses = [main([*words, *more, "--site", site]) for words in json.loads(sys.argv[1])]
sys.stdout.flush()
print(json.dumps(statuses), file=open("statuses.json", "w"))
"""
"""One process for all of them, which is what the suite has time for."""
MODULES = """
import contextlib, io, json, sys
from flows.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    status = main(sys.argv[1:])
heavy = {"pydantic", "scipy", "numpy", "matplotlib", "torch", "transformers", "prefect", "mlflow", "sqlalchemy"}
print(json.dumps([status, sorted(heavy & set(sys.modules))]))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return finished_site(tmp_path_factory.mktemp("finished"))


def every_verb(site: Site, *more: str) -> list[str]:
    return [sys.executable, "-c", EVERY_VERB, json.dumps(READING), str(site.path), *more]


def statuses(folder: Path) -> list[int]:
    numbers: list[int] = json.loads((folder / "statuses.json").read_text())
    return numbers


def shown(site: Site, folder: Path, columns: int, **variables: str) -> Shown:
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), **variables}
    result = run_in_terminal(every_verb(site), columns, folder=folder, variables=environment)
    assert result.status == 0 and "Traceback" not in result.output, result.output
    assert statuses(folder) == [0] * len(READING), result.output
    return result


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_every_verb_fits_the_terminal(site: Site, tmp_path: Path, columns: int) -> None:
    result = shown(site, tmp_path, columns)
    assert result.overflowing() == []
    text = " ".join(" ".join(result.lines()).split())
    assert "next: mansard approve 2 --as NAME" in text and "next: mansard history" in text
    assert "drill: is the way back really one command?" in text


def test_an_error_is_folded_on_a_terminal_only(site: Site, tmp_path: Path) -> None:
    words = ["approve", "2", "--as", "ada", "--reason", "x", "--site", str(site.path)]
    command = [sys.executable, "-m", "flows.cli", *words]
    result = run_in_terminal(command, 40, variables={"PYTHONPATH": os.pathsep.join(sys.path)})
    assert result.status == 5 and result.overflowing() == [] and len(result.lines()) > 2
    piped = run(command, tmp_path, capture_output=True)
    assert piped.returncode == 5 and len(piped.stderr.splitlines()) == 1


def test_why_tells_each_suites_items_and_change(site: Site, tmp_path: Path) -> None:
    result = shown(site, tmp_path, 120)
    assert any(line.startswith("    code-bits (target): pass, n 60, change -0.4") for line in result.lines())


def test_without_colour_none_is_printed(site: Site, tmp_path: Path) -> None:
    result = shown(site, tmp_path, 80, NO_COLOR="1")
    assert not any(f"\x1b[{code}m" in result.output for code in (31, 32, 33, 34, "1;32", "1;36"))


def test_a_dumb_terminal_gets_plain_text(site: Site, tmp_path: Path) -> None:
    assert "\x1b" not in shown(site, tmp_path, 80, TERM="dumb").output


def run(command: Sequence[str], folder: Path, **how: Any) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, text=True, cwd=folder, env=environment, **how)


@pytest.mark.parametrize("more", [(), ("--json",)], ids=["text", "json"])
def test_a_reader_that_went_away_changes_no_exit_code_and_is_no_error(
    site: Site, tmp_path: Path, more: tuple[str, ...]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = run(every_verb(site, *more), tmp_path, stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (0, "")
    assert statuses(tmp_path) == [0] * len(READING)


def mansard(site: Site, *words: str) -> str:
    return " ".join([f"'{sys.executable}'", "-m", "flows.cli", *words, "--site", f"'{site.path}'"])


def test_head_gets_its_line_and_the_command_its_own_exit_code(site: Site, tmp_path: Path) -> None:
    for words, status in ((("history", "--json"), 0), (("review", "2"), 0), (("why", "99"), 2)):
        script = f"set -o pipefail; {mansard(site, *words)} | head -c 20"
        result = run(["bash", "-c", script], tmp_path, capture_output=True)
        assert result.returncode == status, result.stderr
        assert len(result.stderr.splitlines()) == (1 if status else 0), result.stderr
        assert bool(result.stdout) is not bool(status)


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-"])
def test_closed_streams_change_no_exit_code(site: Site, tmp_path: Path, closed: str) -> None:
    for words, status in ((("history", "--json"), 0), (("why", "99"), 2)):
        result = run(["bash", "-c", f"{mansard(site, *words)} {closed}"], tmp_path, capture_output=True)
        assert result.returncode == status
        assert "Traceback" not in result.stderr and "ignored" not in result.stderr
        assert result.stdout == "" or json.loads(result.stdout), "an error never goes to standard output"


def test_a_full_disk_below_standard_output_is_one_line_and_exit_1(site: Site, tmp_path: Path) -> None:
    result = run(["bash", "-c", f"{mansard(site, 'history')} > /dev/full"], tmp_path, capture_output=True)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("mansard history: standard output: cannot be written (No space left on device)")


@pytest.mark.parametrize(
    "words",
    [
        ("keygen", "eve"), ("review", "2"), ("review", "2", "--json"), ("verify",), ("pin",), ("collect", "--dry-run"),
        ("approve", "2", "--as", "grace", "--reason", "holds"), ("reject", "2", "--as", "grace", "--reason", "no"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_the_reviewers_verbs_load_nothing_heavy(site: Site, tmp_path: Path, words: tuple[str, ...]) -> None:
    result = run([sys.executable, "-c", MODULES, *words, "--site", str(site.path)], tmp_path, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [0, []]
