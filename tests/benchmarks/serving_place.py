"""The serving tests' own place (site, keys, store, journal, host) for benchmarks, which pytest does not run."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CONFTEST = ROOT / "tests/mansard/serving/conftest.py"


def place_class() -> Any:
    """`Place` of tests/mansard/serving/conftest.py."""
    spec = importlib.util.spec_from_file_location("serving_conftest", CONFTEST)
    sys.path.insert(0, str(ROOT))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.Place
