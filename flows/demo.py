"""`make demo`: the whole story on a small real model, by the commands that a person would type.

A base is trained on the spot and taken into service as version 1; an upgrade adds a storey; another person approves it;
it is released under traffic, rolled back, approved again and released again. Everything is remembered: run again, no
stage does its work twice. It leaves `demo-summary.json` in the current folder.
"""

import json
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.story import Story, alarm, line, wait_for_requests
from mansard.errors import MansardError
from mansard.launch import Request, derive
from mansard.private_files import use_private_umask
from mansard.records import Derivation
from mansard.site import Site, find_site, load_site
from mansard.store.store import Store
from tasks import standard_streams
from tasks.terminal import stage_progress

ROOT = Path(__file__).resolve().parent.parent
CORPUS = {
    "format": 1,
    "seed": 0,
    "train_code_bytes": None,
    "train_docstring_bytes": None,
    "items_per_suite": 300,
    "choice_items": 300,
}
BASE: dict[str, Any] = {
    "format": 1,
    "model": {"vocabulary": 2048, "hidden": 128, "intermediate": 384, "blocks": 4, "heads": 2, "max_tokens": 1024},
    "sequence_tokens": 256,
    "train": {
        "tokens": 1_000_000,
        "batch_sequences": 4,
        "learning_rates": {"new_blocks": 0.0, "base": 2e-3},
        "precision": "fp32",
        "evaluate_every_steps": 250,
        "checkpoint_every_steps": 100,
    },
}


def main() -> int:
    """Tell the story once; exit status as the failing command's."""
    standard_streams.prepare()
    use_private_umask()
    began = time.monotonic()
    try:
        summary = tell(load_site(find_site(None)))
    except subprocess.CalledProcessError as error:
        alarm(f"demo: stopped: `{' '.join(map(str, error.cmd))}` ended with {error.returncode}")
        return int(error.returncode)
    except MansardError as error:
        alarm(f"demo: {error}")
        return error.exit_code
    Path("demo-summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    show(summary, time.monotonic() - began)
    counts = summary["traffic"]
    if counts["failed"] or counts["broken_streams"]:
        alarm(f"demo: requests were lost: {counts['first_failures']}")
        return 1
    return 0


def tell(site: Site) -> dict[str, Any]:
    """The story; returns what `demo-summary.json` holds."""
    story = Story(site, "demo")
    story.make_keys()
    made = make_base(site)
    story.run("up")
    adopted = story.run_json("adopt", ROOT / "configs/adopt/demo.yaml")
    if not story.was_stable(1):
        story.approve(1, "the base that our users know")
        story.release(1)
    upgraded = story.run_json("upgrade", ROOT / "configs/upgrade/demo.yaml")
    version = upgraded["version"]
    story.run("review", version)
    story.wait_until_served()
    with story.traffic() as counts_file:
        if story.stable_version() != version:
            story.approve(version, "code improves, docstrings hold")
            story.release(version)
        rollback_ms = story.rollback_ms()
        wait_for_requests(counts_file, 200)
        story.approve(version, "the drill went well; released again")
        story.release(version)
    counts = json.loads(counts_file.read_text())
    return {
        "format": 1,
        "stages": [asdict_stage(d) for d in made] + adopted["stages"] + upgraded["stages"],
        "target": [s for s in upgraded["suites"] if s["role"] == "target"],
        "guard": [s for s in upgraded["suites"] if s["role"] == "guard"],
        "verdict": upgraded["verdict"],
        "version": version,
        "chart": upgraded["chart"],
        "traffic": counts,
        "rollback_ms": rollback_ms,
        "urls": upgraded["urls"],
    }


def make_base(site: Site) -> list[Derivation]:
    """The text and the small model that stand for a base in service."""
    store = Store.of(site)
    with stage_progress() as progress:
        asked = Request("corpus", {}, {**CORPUS, "python": platform.python_version()})
        corpus = derive(store, site, asked, progress)
        base = derive(store, site, Request("pretrain", {"corpus": corpus.snapshot}, BASE), progress)
    for derivation, folder in ((corpus, site.data / "corpus"), (base, site.data / "base")):
        if not folder.exists():
            store.restore(derivation.snapshot, folder)
    return [corpus, base]


def asdict_stage(derivation: Derivation) -> dict[str, Any]:
    """The four facts of a stage that the summary tells."""
    facts = asdict(derivation)
    return {"name": facts["stage"], **{k: facts[k] for k in ("snapshot", "seconds", "reused")}}


def show(summary: dict[str, Any], seconds: float) -> None:
    """The table at the end."""
    table = Table(title="The demo's stages")
    for column in ("stage", "made", "seconds", "reused"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    for stage in summary["stages"]:
        reused = "yes" if stage["reused"] else ""
        table.add_row(stage["name"], stage["snapshot"][:12], f"{stage['seconds']:.1f}", reused)
    out = Console()
    out.print(table)
    for role in ("target", "guard"):
        for suite in summary[role]:
            low, high = suite["interval"] or (None, None)
            change = "" if low is None else f" (change {low:+.3f} to {high:+.3f})"
            line(out, f"{role:6} {suite['suite']}: {suite['before']:.3f} -> {suite['after']:.3f}{change}")
    counts = summary["traffic"]
    line(out, f"verdict   {summary['verdict']} (version {summary['version']} is stable)")
    line(out, f"chart     {summary['chart']}")
    failures = f"{counts['failed']} failed, {counts['broken_streams']} broken streams"
    line(out, f"traffic   {counts['requests']} requests, {failures}")
    line(out, f"rollback  {summary['rollback_ms']:.0f} ms, the whole command from the shell")
    for name, url in summary["urls"].items():
        line(out, f"{name:9} {url}")
    line(out, f"told in {seconds:.0f} s; the stack keeps running (mansard down stops it); facts: demo-summary.json")


if __name__ == "__main__":
    sys.exit(main())
