"""What each stage's code was when its CODE_VERSION was last raised: `make stage-versions` writes it, a test compares.

The digest covers the syntax (not comments or docstrings) of the stage's module and of every module of its own package
and of `mansard.models` that it imports, directly or not.
"""

import ast
import json
import sys
from importlib.util import find_spec
from pathlib import Path

from mansard.digest import digest_json
from mansard.stages import STAGES, declaration

RECORD = Path(__file__).with_name("stage_versions.json")
SURGERY = ("mansard.models", "mansard.training", "mansard.evaluation", "mansard.demo", "mansard.carry_on")


def stage_digest(stage: str) -> str:
    """Digest of the code that decides what the stage makes."""
    seen: dict[str, str] = {}
    _collect(STAGES[stage], seen)
    return digest_json(seen)


def _collect(module: str, seen: dict[str, str]) -> None:
    found = find_spec(module)
    if module in seen or found is None or found.origin is None or not module.startswith(SURGERY):
        return
    tree = ast.parse(Path(found.origin).read_text())
    seen[module] = ast.dump(_without_docstrings(tree)).replace(", type_params=[]", "")  # Python 3.12 adds it
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            _collect(node.module, seen)
            for name in node.names:
                if node.module.startswith(SURGERY) and not Path(str(found.origin)).is_dir():
                    _collect_if_module(f"{node.module}.{name.name}", seen)


def _collect_if_module(module: str, seen: dict[str, str]) -> None:
    try:
        found = find_spec(module)
    except ModuleNotFoundError:
        return
    if found is not None:
        _collect(module, seen)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        has_body = isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
        if has_body and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return tree


def current() -> dict[str, list[object]]:
    return {s: [declaration(s).code_version, stage_digest(s)] for s in STAGES}


if __name__ == "__main__":
    RECORD.write_text(json.dumps(current(), indent=1) + "\n")
    sys.exit(0)
