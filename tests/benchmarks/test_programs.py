"""Every program here can be started: it imports what is there, and says what it takes without beginning to measure."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PROGRAMS = sorted(path.stem for path in HERE.glob("*.py") if not path.stem.startswith(("test_", "__")))


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_imports_and_tells_its_arguments(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(HERE)
    program = importlib.import_module(name)
    if hasattr(program, "argparse"):
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit) as ended:
            program.main(*([sys.argv[1:]] if program.main.__annotations__.get("arguments") else []))
        lines = capsys.readouterr().out.splitlines()  # a library may have said something while it was imported
        assert ended.value.code == 0 and any(line.startswith("usage:") for line in lines)


def start(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(HERE), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_an_unknown_benchmark_is_refused_with_the_names() -> None:
    refused = start("ruoter")
    assert refused.returncode == 2 and refused.stdout == ""
    assert "unknown NAME ('ruoter')" in refused.stderr and " router," in refused.stderr


def test_every_benchmark_that_the_documents_name_is_there() -> None:
    names = set(start().stderr.split("one of: ")[1].strip().split(", "))
    documents = [ROOT / "README.md", HERE / "FIGURES.md", *(ROOT / "infra").glob("*.md")]
    text = " ".join(document.read_text() for document in documents)
    assert set(re.findall(r"make\s+bench NAME=([a-z-]+)", text)) <= names


def test_a_benchmark_started_by_name_prints_json_last() -> None:
    finished = start("gate", "40")  # worlds a case: too few to judge by, so its status says nothing
    assert "false_promotion_rate" in json.loads(finished.stdout.splitlines()[-1]), finished.stderr
