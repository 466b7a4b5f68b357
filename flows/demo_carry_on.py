"""`make demo-carry-on`: after `make demo`, a branch on the demo's stable version, by the commands that a person types.

States come from a vLLM engine, the branch is trained without the base, judged, approved, released under traffic and
rolled back. It leaves `demo-carry-on-summary.json` in the current folder; run again, nothing is derived twice.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from flows.demo import ROOT
from flows.story import Story, alarm, console, line, wait_for_requests
from mansard.errors import BadInput, MansardError
from mansard.private_files import use_private_umask
from mansard.site import Site, find_site, load_site
from tasks import standard_streams

SPEC = ROOT / "configs/customize/demo.yaml"


def main() -> int:
    """Tell the story once; exit status as the failing command's."""
    standard_streams.prepare()
    use_private_umask()
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
    story = Story(site, "demo")
    if story.stable_version() is None:
        raise BadInput("nothing is stable yet; run `make demo` first")
    story.run("up")
    story.wait_until_served()
    began = time.monotonic()
    made = story.run_json("customize", SPEC)
    seconds = time.monotonic() - began
    version = made["version"]
    story.run("review", version)
    with story.traffic() as counts_file:
        if story.stable_version() != version:
            story.approve(version, "code improves, docstrings hold")
            story.release(version)
        wait_for_requests(counts_file, 50)
        rollback_ms = story.rollback_ms()
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
