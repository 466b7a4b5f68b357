"""What of Mansard needs no torch, on this interpreter: every module that it has is compiled, those that import without
torch and what is built on it are imported, and the unit tests that collect without them are run. Warnings are errors.

Arguments go on to pytest; paths among them stand for UNIT_TESTS. For an interpreter that has no full environment
(`.ci/run`: Python 3.12); `make test` is the whole suite.
"""

import compileall
import importlib
import os
import pkgutil
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mansard", "tasks", "flows")
UNIT_TESTS = ("tests/mansard", "tests/mansard_vllm")
LEFT_OUT = (
    # Servers, stages and killed writers: most of the minutes, and the least that a Python version changes.
    *(f"--ignore=tests/mansard/{path}" for path in ("serving", "store", "release", "models", "test_launch.py",
                                                     "training/test_worker_start.py")),
)
"""Two minutes are what all of this may take on two cores; `make test` runs everything on 3.11."""
ABSENT = frozenset({"torch", "deepspeed", "datasets", "transformers", "lm_eval", "llmcompressor", "peft", "torchao",
                    "matplotlib"})  # fmt: skip
"""Torch, and what the light environment leaves out with it; anything else that is missing is a fault."""


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: Any) -> Generator[None, Any, Any]:
    """A file that cannot be collected without them is skipped."""
    report = yield
    if report.failed and any(f"No module named '{name}" in str(report.longrepr) for name in ABSENT):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, "Skipped: needs torch")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Generator[None, Any, Any]:
    """So is a test that imports them later."""
    report = yield
    error = call.excinfo.value if call.excinfo else None
    if isinstance(error, ModuleNotFoundError) and absent_name(error) in ABSENT:
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, "Skipped: needs torch")
    return report


def absent_name(error: ModuleNotFoundError) -> str:
    return (error.name or "").partition(".")[0]


def import_all() -> int:
    """How many modules were imported; what is missing beside ABSENT ends it."""
    count = 0
    for package in PACKAGES:
        for name in [package, *submodules(importlib.import_module(package))]:
            try:
                importlib.import_module(name)
                count += 1
            except ModuleNotFoundError as error:
                if absent_name(error) not in ABSENT:
                    raise
    return count


def submodules(package: ModuleType) -> list[str]:
    """Their names; `__main__` modules run something."""
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.", onerror=lambda _: None)
    return [module.name for module in found if not module.name.endswith("__main__")]


def main() -> int:
    """Imports and tests in processes of their own: pytest rewrites what it imports first."""
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:] == ["imports"]:
        print(f"Python {sys.version.split()[0]}: {import_all()} modules import without torch")
        return 0
    folders = [*PACKAGES, "infra/vllm-plugin", "tests"]
    if not all(compileall.compile_dir(ROOT / folder, quiet=1, force=True) for folder in folders):
        return 1
    if status := subprocess.run([sys.executable, "-W", "error", __file__, "imports"], check=False).returncode:
        return status
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / ".ci")])}
    chosen = ["-q", "-rfE", "-n", "2", "-p", "without_torch", "-p", "no:cacheprovider", "-m", "not slow and not engine"]
    has_paths = any((ROOT / argument).exists() for argument in sys.argv[1:])
    command = [sys.executable, "-m", "pytest", *chosen, *sys.argv[1:], *([] if has_paths else [*UNIT_TESTS, *LEFT_OUT])]
    return subprocess.run(command, check=False, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
