"""infra/setup-environment.sh takes the first Python that starts and has a version that the lock is for."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIM = "#!/bin/sh\necho 'pyenv: command not found' >&2\nexit 127\n"


def interpreter(version: str) -> str:
    """Says its version, and makes no environment."""
    return f'#!/bin/sh\n[ "$1" = -c ] && echo {version} || exit 1\n'


def set_up(folder: Path, environment: str, interpreters: dict[str, str], python: str = "python3.11") -> str:
    """What the script says before it ends, with these interpreters first on the path."""
    for name, script in interpreters.items():
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    run = subprocess.run(
        ["bash", ROOT / "infra/setup-environment.sh", environment],
        env={"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHON": python, "MANSARD_GPU": "no"},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert run.returncode == 1
    return run.stderr


@pytest.mark.parametrize(
    ("environment", "interpreters", "python", "expected"),
    [
        ("main", {"python3.11": interpreter("3.11")}, "python3.11", "Python 3.11 (python3.11)"),
        ("main", {"python3.12": interpreter("3.12")}, "python3.12", "Python 3.12 (python3.12)"),
        ("main", {"python3.11": SHIM, "python3.12": interpreter("3.12")}, "python3.11", "Python 3.12 (python3.12)"),
        ("serve", {"python3.12": interpreter("3.12"), "python3.11": interpreter("3.11")}, "python3.12", "Python 3.11"),
        ("python312", {"python3.12": interpreter("3.12")}, "python3.12", "Python 3.12 (python3.12)"),
    ],
)
def test_an_interpreter_is_chosen_by_what_it_says_of_itself(
    tmp_path: Path, environment: str, interpreters: dict[str, str], python: str, expected: str
) -> None:
    lines = set_up(tmp_path, environment, interpreters, python)
    assert expected in lines and "setup: cannot make .venv" in lines


def test_without_one_the_versions_that_are_there_are_named(tmp_path: Path) -> None:
    old = {"python3.11": SHIM, "python3.12": SHIM, "python3": interpreter("3.9")}
    lines = set_up(tmp_path, "main", old)
    assert lines.startswith("setup: environment main: no Python 3.11 or 3.12 is here (python3 (3.9));")
