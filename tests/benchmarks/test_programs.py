"""Every program here can be started: it imports what is there, and says what it takes without beginning to measure."""

import importlib
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PROGRAMS = sorted(path.stem for path in HERE.glob("*.py") if not path.stem.startswith("test_"))


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
        assert ended.value.code == 0 and capsys.readouterr().out.startswith("usage:")
