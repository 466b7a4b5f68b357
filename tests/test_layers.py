"""The import contracts of pyproject.toml hold, and the packages come from this checkout."""

import subprocess
import sys
from pathlib import Path

import flows
import mansard
import tasks

ROOT = Path(__file__).resolve().parent.parent


def test_import_contracts_hold() -> None:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_packages_are_imported_from_this_checkout() -> None:
    for package in (mansard, flows, tasks):
        assert Path(str(package.__file__)).parent.parent == ROOT


def test_no_module_has_a_name_that_says_nothing() -> None:
    banned = {"utils", "common", "helpers", "misc", "base", "manager"}
    allowed = {ROOT / "mansard/demo/base.py"}  # the base model of the demo: design.md's word
    found = [p for top in ("mansard", "flows", "tasks") for p in (ROOT / top).rglob("*.py")]
    assert [p for p in found if p.stem in banned and p not in allowed] == []


def test_on_call_verbs_load_no_heavy_package() -> None:
    code = (
        "import sys, flows.cli, flows.verbs_on_call\n"
        "heavy = {'torch', 'prefect', 'mlflow', 'transformers', 'pydantic', 'rich', 'aiohttp', 'numpy', 'psycopg'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
