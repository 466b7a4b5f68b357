"""`make demo-carry-on`: after `make demo`, a branch on the demo's stable version, by the commands that a person types.

States come from a vLLM engine, the branch is trained without the base, judged, approved, released under traffic and
rolled back. It leaves `demo-carry-on-summary.json` in the current folder; run again, nothing is derived twice.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from flows.demo import (
    ROOT,
    alarm,
    approve,
    console,
    line,
    mansard,
    mansard_json,
    rollback_drill,
    stable_version,
    traffic,
    wait_for_requests,
    wait_until_served,
)  # fmt: skip
from mansard.errors import BadInput, MansardError
from mansard.site import Site, find_site, load_site
from tasks import standard_streams

SPEC = ROOT / "configs/customize/demo.yaml"


def main() -> int:
    """Tell the story once; exit status as the failing command's."""
    standard_streams.prepare()
    try:
        return tell(load_site(find_site(None)))
    except subprocess.CalledProcessError as error:
        alarm(f"demo: stopped: `{' '.join(map(str, error.cmd))}` ended with {error.returncode}")
        return int(error.returncode)
    except MansardError as error:
        alarm(f"demo: {error}")
        return error.exit_code


def tell(site: Site) -> int:
    """Customize, review, approve, release under traffic, roll back."""
    if stable_version(site) is None:
        raise BadInput("nothing is stable yet; run `make demo` first")
    mansard(site, "up")
    wait_until_served(site)
    began = time.monotonic()
    made = mansard_json(site, "customize", SPEC)
    seconds = time.monotonic() - began
    version = made["version"]
    mansard(site, "review", version)
    with traffic(site) as counts_file:
        if stable_version(site) != version:
            approve(site, version, "code improves, docstrings hold")
            mansard(site, "release", version, "--as", "ada")
        wait_for_requests(counts_file, 50)
        rollback_ms = rollback_drill(site)
    counts = json.loads(counts_file.read_text())
    summary = {**made, "customize_seconds": round(seconds, 1), "rollback_ms": rollback_ms, "traffic": counts}
    Path("demo-carry-on-summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    for suite in made["suites"]:
        line(console, f"{suite['role']} {suite['suite']}: {suite['before']} -> {suite['after']}: {suite['verdict']}")
    line(console, f"verdict   {made['verdict']} (version {version}), customized in {seconds:.0f} s")
    line(console, f"traffic   {counts['requests']} requests, {counts['failed']} failed, rollback {rollback_ms:.0f} ms")
    return 1 if counts["failed"] or counts["broken_streams"] else 0


if __name__ == "__main__":
    sys.exit(main())
