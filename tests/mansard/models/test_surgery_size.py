import json
import os
import subprocess
import sys
from pathlib import Path

import mansard

CHECKOUT = Path(mansard.__file__).parent.parent


def test_seventy_billion_parameters_are_expanded_and_fused_without_reading_a_tensor() -> None:
    done = subprocess.run(
        [sys.executable, "tests/benchmarks/bench_surgery.py"],
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["tensor_bytes_read"] == 0
    assert result["peak_mb"] < 200
    assert result.keys() == {"expand_ms", "fuse_ms", "peak_mb", "tensor_bytes_read"}
