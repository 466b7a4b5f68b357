"""`make example NAME=smollm2`: a published model is adopted and upgraded on real text, by the commands of a person.

The small form (two CPU cores, within 40 minutes) ends with a verdict. `--full` (a GPU) goes on: approved, released
under traffic, rolled back, approved and released again, with a table of stages and GPU use. Run again, no stage works
twice. The last line of standard output is JSON.
"""

import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from flows.example_material import ROOT, prepare
from flows.gpu_use import GpuUse, gpu_use, stage_rows
from flows.story import Story, alarm, console, wait_for_requests
from mansard.errors import MansardError
from mansard.private_files import use_private_umask
from mansard.site import load_site
from mansard.store.store import Store
from tasks import standard_streams

EXAMPLES = ROOT / "configs/examples"
FAILED_VERDICT = 3
PROMPTS = ("Um den Dialog zu öffnen", "Wählen Sie", "Die Tabelle enthält", "To open the dialog", "Choose", "The table")


@dataclass(slots=True)
class Timeline:
    """What the commands took, and the GPU meanwhile; `rows` for the table and the JSON."""

    store: Store
    use: GpuUse
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, command: str, begin: float, stages: Sequence[dict[str, Any]] = ()) -> None:
        made = [s for s in stages if not s["reused"]]
        timed = [t for s in made if (t := _timed(self.store, s)) is not None and t["begin"] >= begin - 1]
        self.rows += stage_rows(command, begin, time.time(), timed, self.use)


def main() -> int:
    """Exit status as `mansard upgrade`'s, or the failing command's."""
    options = parsed(sys.argv[1:])
    standard_streams.prepare()
    use_private_umask()
    began = time.monotonic()
    try:
        if options.prepare_only is not None:
            prepare(options.prepare_only)
            return 0
        summary = tell(options, began)
    except subprocess.CalledProcessError as error:
        alarm(f"example: stopped: `{' '.join(map(str, error.cmd))}` ended with {error.returncode}")
        return int(error.returncode)
    except MansardError as error:
        alarm(str(error))
        return error.exit_code
    print(json.dumps(summary))
    if summary.get("failed"):
        return 1
    return 0 if summary["verdict"] == "pass" else FAILED_VERDICT


def parsed(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make example NAME=... ARGS=...", description=__doc__)
    parser.add_argument("name", choices=sorted(f.name for f in EXAMPLES.iterdir() if f.is_dir()))
    parser.add_argument("--full", action="store_true", help="the form for a GPU, up to the second release")
    parser.add_argument("--site", type=Path, help="another site file than the example's own")
    parser.add_argument("--model-folder", type=Path, help="a model that --prepare-only wrote, or the model itself")
    parser.add_argument("--text-folder", type=Path, help="text that --prepare-only wrote")
    parser.add_argument("--prepare-only", type=Path, metavar="DIR", help="write DIR/model and DIR/text, and stop")
    return parser.parse_args(words)


def tell(options: argparse.Namespace, began: float) -> dict[str, Any]:
    """The story; returns what the last line says."""
    folder = EXAMPLES / options.name
    form = "full" if options.full else "small"
    site = load_site(options.site or folder / ("site-gpu.yaml" if options.full else "site.yaml"))
    story = Story(site, options.name)
    prepare(site.data, options.model_folder, options.text_folder)
    with gpu_use() as use:
        timeline = Timeline(Store.of(site), use)
        upgraded = upgrade_base(story, folder, form, timeline)
        summary = summary_of(upgraded)
        if options.full and upgraded["verdict"] == "pass":
            summary |= release_under_traffic(story, upgraded["version"], timeline)
    show(summary, timeline.rows)
    if options.full:
        summary["stages"] = timeline.rows
    summary["seconds"] = round(time.monotonic() - began, 1)
    console.print(f"finished in {summary['seconds']:.0f} s; the stack is still running; stop it: "
                  f"mansard down --site {site.path}", soft_wrap=True)  # fmt: skip
    return summary


def upgrade_base(story: Story, folder: Path, form: str, timeline: Timeline) -> dict[str, Any]:
    """Version 1 into service, and what `mansard upgrade` says of the version after it."""
    story.make_keys()
    begin = time.time()
    story.run("up")
    timeline.add("up", begin)
    begin = time.time()
    adopted = story.run_json("adopt", folder / f"adopt-{form}.yaml")
    timeline.add("adopt", begin, adopted["stages"])
    if not story.was_stable(adopted["version"]):
        begin = time.time()
        story.approve(adopted["version"], "the model as it was published")
        story.release(adopted["version"])
        timeline.add("release 1", begin)
    begin = time.time()
    upgraded = story.run_json("upgrade", folder / f"upgrade-{form}.yaml", statuses=(0, FAILED_VERDICT))
    timeline.add("upgrade", begin, upgraded["stages"])
    story.run("review", upgraded["version"])
    return upgraded


def release_under_traffic(story: Story, version: int, timeline: Timeline) -> dict[str, Any]:
    """Approved, released, rolled back and released again while users ask."""
    story.wait_until_served()
    with story.traffic(PROMPTS) as counts_file:
        if story.stable_version() != version:
            story.approve(version, "German improves, English holds")
            begin = time.time()
            story.release(version)
            timeline.add("release", begin)
        begin = time.time()
        rollback_ms = story.rollback_ms()
        timeline.add("rollback", begin)
        requests = json.loads(counts_file.read_text())["requests"]
        wait_for_requests(counts_file, requests + 100)
        story.approve(version, "the drill went well; released again")
        begin = time.time()
        story.release(version)
        timeline.add("release again", begin)
    counts = json.loads(counts_file.read_text())
    failed = counts["failed"] + counts["broken_streams"]
    for fault in counts["first_failures"]:
        alarm(f"lost: {fault}")
    return {"rollback_ms": rollback_ms, "requests": counts["requests"], "failed": failed}


def summary_of(upgraded: dict[str, Any]) -> dict[str, Any]:
    """Verdict and figures; bits per byte, lower is better."""
    target = next(s for s in upgraded["suites"] if s["role"] == "target")
    names = ("suite", "before", "after", "interval", "verdict")
    guards = [{name: s[name] for name in names} for s in upgraded["suites"] if s["role"] == "guard"]
    return {
        "verdict": upgraded["verdict"],
        "target_before": target["before"],
        "target_after": target["after"],
        "guards": guards,
    }


def show(summary: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """The table for a person, on standard error."""
    table = Table(title="The example's stages")
    heads = ("name", "seconds", "gpu_mean_percent", "gpu_idle_share", "gpu_gib")
    used = [h for h in heads if any(h in row for row in rows)]
    for head in used:
        table.add_column(head.replace("_", " "), justify="left" if head == "name" else "right")
    for row in rows:
        table.add_row(*(str(row.get(head, "")) for head in used))
    console.print(table)
    console.print(f"verdict {summary['verdict']}: German {summary['target_before']:.3f} -> "
                  f"{summary['target_after']:.3f} bits per byte")  # fmt: skip
    for guard in summary["guards"]:
        console.print(f"guard {guard['suite']}: {guard['before']:.3f} -> {guard['after']:.3f}, {guard['verdict']}")


def _timed(store: Store, stage: dict[str, Any]) -> dict[str, Any] | None:
    """When a stage of an outcome ran, by its lineage record; None for one that no process made."""
    records = [r for r in store.lineage(stage["snapshot"]) if r["stage"] == stage["name"] and "begun_at" in r]
    if not records:
        return None
    begin = datetime.datetime.fromisoformat(records[-1]["begun_at"]).timestamp()
    return {"name": stage["name"], "begin": begin, "seconds": float(records[-1]["seconds"])}


if __name__ == "__main__":
    sys.exit(main())
