"""transformers' classes come from one module, which leaves out what they do not need."""

import ast
import subprocess
import sys
from pathlib import Path

import mansard

PACKAGE = Path(mansard.__file__).parent
COSTLY = {"AutoModelForCausalLM", "AutoTokenizer", "GenerationMixin", "PreTrainedModel", "PreTrainedTokenizerBase"}
CODE = """
import sys
sys.modules["transformers"] = stand_in = type(sys)("transformers")
stand_in.__dict__.update(dict.fromkeys(sys.argv[1:]))
absent = []
stand_in.__getattr__ = lambda name: absent.extend(sorted(k for k, v in sys.modules.items() if v is None))
del stand_in.AutoTokenizer
from mansard.models.transformers_classes import NOT_NEEDED
assert set(absent) == set(NOT_NEEDED), absent
import boto3
"""


def test_costly_classes_are_imported_in_one_module() -> None:
    found = {}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "transformers":
                names = COSTLY & {alias.name for alias in node.names}
                found |= {str(file.relative_to(PACKAGE)): names} if names else {}
    assert set(found) == {"models/transformers_classes.py"}


def test_what_is_not_needed_is_absent_during_the_import_alone() -> None:
    ran = subprocess.run([sys.executable, "-c", CODE, *sorted(COSTLY)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
