"""A scheduled upgrade that fails is told to people; one that a person started tells that person.

prefect and mlflow are imported inside the functions: collecting tests stays quick.
"""

import json
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

pytestmark = pytest.mark.slow

PROGRAM = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(sys.stdin.read())"


@pytest.fixture
def site_path(tmp_path: Path) -> Path:
    tree = {
        "format": 1,
        "home": ".",
        "data": "data",
        "models": ["demo"],
        "environments": {"main": {"python": "p", "lock": "l"}, "serve": {"python": "p", "lock": "l"}},
        "stages": {"default": "main"},
        "notify": [sys.executable, "-c", PROGRAM, str(tmp_path / "heard")],
    }
    (tmp_path / "site.yaml").write_text(json.dumps(tree))
    return tmp_path / "site.yaml"


def run(site_path: Path, is_scheduled: bool) -> "FlowRun":
    from prefect.client.schemas.objects import FlowRun

    parameters = {"site_path": str(site_path), "spec_path": "nightly.yaml", "as_person": "ada"}
    return FlowRun(flow_id=uuid4(), name="upgrade nightly", auto_scheduled=is_scheduled, parameters=parameters)


def test_a_scheduled_run_that_failed_is_told(site_path: Path) -> None:
    from prefect.client.schemas.objects import State, StateType

    from flows.failure import tell_of_failure
    from flows.upgrade import upgrade

    assert tell_of_failure in upgrade.on_failure_hooks and tell_of_failure in upgrade.on_crashed_hooks
    state: State[object] = State(type=StateType.FAILED, message="stage train: out of memory")
    tell_of_failure(upgrade, run(site_path, True), state)
    pause = threading.Event()
    heard = site_path.parent / "heard"
    for _ in range(6000):
        if heard.exists() and heard.read_text().endswith("\n"):
            break
        pause.wait(0.02)
    told = json.loads(heard.read_text())
    assert (told["event"], told["model"], told["spec"], told["who"]) == (
        *("upgrade_failed", "demo", "nightly.yaml", "ada"),
    )
    assert told["text"] == "the scheduled upgrade nightly failed: stage train: out of memory"


def test_a_persons_own_run_and_a_site_that_is_gone_call_nobody(
    site_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from prefect.client.schemas.objects import State, StateType

    from flows.failure import tell_of_failure
    from flows.upgrade import upgrade

    state: State[object] = State(type=StateType.CRASHED)
    tell_of_failure(upgrade, run(site_path, False), state)
    assert not (site_path.parent / "logs").exists()
    site_path.unlink()
    tell_of_failure(upgrade, run(site_path, True), state)
    assert "nobody could be told" in capsys.readouterr().err
