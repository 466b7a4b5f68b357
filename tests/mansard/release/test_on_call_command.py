"""The on-call's commands as processes, with the host and every server down: right answers, and nothing heavy loaded."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from mansard.records import Registration
from mansard.release.journal import Journal
from mansard.site import Site

RUN = """
import contextlib, io, json, sys
from flows.cli import main
printed = io.StringIO()
with contextlib.redirect_stdout(printed):
    status = main(sys.argv[1:])
heavy = {"torch", "prefect", "mlflow", "vllm", "pydantic", "numpy", "aiohttp", "rich", "cryptography", "psycopg"}
print(json.dumps({"status": status, "printed": printed.getvalue(), "loaded": sorted(heavy & set(sys.modules))}))
"""


@pytest.fixture
def two_versions(site: Site, journal: Journal, candidate: Callable[..., Registration]) -> Site:
    """Version 2 is stable, version 1 is previous; no engine answers."""
    for name in ("one", "two"):
        version = journal.register(candidate(name), None)
        journal.start_rollout("demo", version, "ada", "", journal.pointers("demo"))
        journal.promote("demo", version, "ada", "", journal.pointers("demo"))
    return site


def command(site: Site, *words: str) -> dict[str, Any]:
    whole = [sys.executable, "-c", RUN, *words, "--model", "demo", "--site", str(site.path)]
    done = subprocess.run(whole, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_on_call_commands_load_nothing_heavy(two_versions: Site) -> None:
    for words in (("rollback", "--as", "otto", "--hard", "--json"), ("history",), ("why", "1"), ("status",)):
        ran = command(two_versions, *words)
        assert (ran["status"], ran["loaded"]) == (0, []), words


def test_rollback_with_the_host_down_moves_pointer_and_split(two_versions: Site, journal: Journal) -> None:
    rolled = json.loads(command(two_versions, "rollback", "--as", "otto", "--hard", "--json")["printed"])
    assert (rolled["changed"], rolled["stable"], rolled["host"]) == (True, 1, "down")
    assert journal.pointers("demo").stable == 1
    assert json.loads(two_versions.split_file.read_text())["models"]["demo"]["stable"] == 1
    again = json.loads(command(two_versions, "rollback", "--as", "ada", "--json")["printed"])
    assert (again["changed"], again["stable"]) == (False, 1)


def test_a_previous_without_an_engine_is_not_taken_unless_hard(two_versions: Site, journal: Journal) -> None:
    assert command(two_versions, "rollback", "--as", "otto")["status"] == 1
    assert journal.pointers("demo").stable == 2
