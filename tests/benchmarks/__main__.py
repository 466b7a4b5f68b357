"""`make bench NAME=router` starts one benchmark of this folder; the last line that it prints is JSON.

`NAME` is the file's name without `bench_`, words joined by dashes; `ARGS="--device cpu"` reaches the program as it is.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SERVING_PYTHON = str(ROOT / ".venv-serve/bin/python")
LONG_NAMES = ("efficacy", "carry_on_learning", "carry_on_reasoning", "carry_on_taps")
"""Programs that measure and are not called bench_*.py."""
DEFAULT_ARGUMENTS = {
    "efficacy": ("--small",),
    "branch-serving-gpu": ("--python", SERVING_PYTHON),
    "capture": ("--python", SERVING_PYTHON),
}
NEEDED_TARGETS = {"router": ".venv-litellm/.ready", "training": ".swift/.ready"}
"""What `make` prepares first: a peer's package to measure beside. The benchmark says so where it is missing."""


def programs() -> dict[str, Path]:
    """Every benchmark by its name."""
    files = [*HERE.glob("bench_*.py"), *(HERE / f"{name}.py" for name in LONG_NAMES)]
    return {file.stem.removeprefix("bench_").replace("_", "-"): file for file in sorted(files)}


def main(arguments: Sequence[str]) -> int:
    name, *rest = arguments or [""]
    available = programs()
    if name not in available:
        print(f"bench: unknown NAME ({name!r}); one of: {', '.join(sorted(available))}", file=sys.stderr)
        return 2
    if name in NEEDED_TARGETS:
        target = NEEDED_TARGETS[name]
        if subprocess.run(["make", "--no-print-directory", target], cwd=ROOT, stdout=sys.stderr).returncode:
            print(f"bench: {target} could not be made; {name} measures without it", file=sys.stderr)
    program = str(available[name])
    command = [sys.executable, program, *(rest or DEFAULT_ARGUMENTS.get(name, ()))]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
