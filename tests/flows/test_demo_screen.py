"""What `make demo` prints on a terminal, its commands and its end."""

import os
import sys

import pytest

from tests.terminal import run_in_terminal

PATH = "/home/somebody/a/folder/with/a/long/name/mansard/.mansard/reports/demo-2/chart[1].png"
CODE = f"""
from flows.demo import show
from flows.story import alarm, show_command
suite = {{"suite": "code-bits", "before": 2.47, "after": 2.127, "interval": [-0.364, -0.324]}}
counts = {{"requests": 1432, "failed": 0, "broken_streams": 0}}
stages = [{{"name": name, "snapshot": "ab" * 32, "seconds": 12.5, "reused": False}} for name in ("corpus", "train")]
show_command("approve", 2, "--reason", "it [holds] well")
alarm("demo: [/red] no such file: [x]")
show({{"stages": stages, "target": [suite], "guard": [suite | {{"interval": None}}], "verdict": "pass", "version": 2,
      "chart": "{PATH}", "traffic": counts, "rollback_ms": 609.0, "urls": {{"mlflow": "http://127.0.0.1:5000"}}}},
     675.0)
"""


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_the_demos_end_is_legible_and_its_paths_stay_whole(columns: int) -> None:
    variables = {"PYTHONPATH": os.pathsep.join(sys.path)}
    shown = run_in_terminal([sys.executable, "-c", CODE], columns, variables=variables)
    lines = shown.lines()
    assert shown.status == 0, shown.output
    assert lines[0] == '$ mansard approve 2 --reason "it [holds] well"'
    assert "demo: [/red] no such file: [x]" in lines
    assert f"chart     {PATH}" in lines
    assert "target code-bits: 2.470 -> 2.127 (change -0.364 to -0.324)" in lines
    assert "guard  code-bits: 2.470 -> 2.127" in lines
    assert lines[-2].startswith("told in 675 s; the stack keeps running")
    assert all(len(line) <= columns for line in lines if "│" in line)
