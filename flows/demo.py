"""`make demo`: the whole story on a small real model, by the commands that a person would type.

A base is trained on the spot and taken into service as version 1; an upgrade adds a storey; another person approves it;
it is released under traffic, rolled back, approved again and released again. Everything is remembered: run again, no
stage does its work twice. It leaves `demo-summary.json` in the current folder.
"""

import asyncio
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.demo_traffic import USERS
from mansard.errors import MansardError
from mansard.launch import Request, derive
from mansard.records import Derivation
from mansard.release.events import PROMOTED
from mansard.release.journal import Journal
from mansard.serving.client import HostClient
from mansard.serving.host.release_users import read_users
from mansard.site import Site, find_site, load_site
from mansard.store.store import Store
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
MANSARD = [sys.executable, "-m", "flows.cli"]
console = Console(stderr=True)


def main() -> int:
    """Tell the story once; exit status as the failing command's."""
    site = load_site(find_site(None))
    began = time.monotonic()
    try:
        summary = tell(site)
    except subprocess.CalledProcessError as error:
        console.print(f"[red]demo: stopped: `{' '.join(map(str, error.cmd))}` ended with {error.returncode}[/red]")
        return int(error.returncode)
    except MansardError as error:
        console.print(f"[red]demo: {error}[/red]")
        return error.exit_code
    Path("demo-summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    show(summary, time.monotonic() - began)
    counts = summary["traffic"]
    if counts["failed"] or counts["broken_streams"]:
        console.print(f"[red]demo: requests were lost: {counts['first_failures']}[/red]")
        return 1
    return 0


def tell(site: Site) -> dict[str, Any]:
    """The story; returns what `demo-summary.json` holds."""
    for person in ("ada", "grace"):
        if not (site.keys / f"{person}.key").exists():
            mansard(site, "keygen", person)
    made = make_base(site)
    mansard(site, "up")
    adopted = mansard_json(site, "adopt", ROOT / "configs/adopt/demo.yaml")
    if not was_stable(site, 1):
        approve(site, 1, "the base that our users know")
        mansard(site, "release", 1, "--as", "ada")
    upgraded = mansard_json(site, "upgrade", ROOT / "configs/upgrade/demo.yaml")
    version = upgraded["version"]
    mansard(site, "review", version)
    wait_until_served(site)
    with traffic(site) as counts_file:
        if stable_version(site) != version:
            approve(site, version, "code improves, docstrings hold")
            mansard(site, "release", version, "--as", "ada")
        rollback_ms = rollback_drill(site)
        wait_for_requests(counts_file, 200)
        approve(site, version, "the drill went well; released again")
        mansard(site, "release", version, "--as", "ada")
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


def mansard(site: Site, verb: str, *words: object) -> None:
    """Run a command as a person would; its output is theirs."""
    console.print(f"[bold]$ mansard {verb} {' '.join(map(shown, words))}[/bold]")
    subprocess.run([*MANSARD, verb, *map(str, words), "--site", str(site.path)], check=True)


def mansard_json(site: Site, verb: str, *words: object) -> dict[str, Any]:
    """Run a command with --json and return what it printed; progress stays on standard error."""
    console.print(f"[bold]$ mansard {verb} {' '.join(map(shown, words))}[/bold]")
    command = [*MANSARD, verb, *map(str, words), "--site", str(site.path), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def shown(word: object) -> str:
    text = os.path.relpath(word) if isinstance(word, Path) else str(word)
    return f'"{text}"' if " " in text else text


def approve(site: Site, version: int, reason: str) -> None:
    mansard(site, "approve", version, "--reason", reason, "--as", "grace")


def stable_version(site: Site) -> int | None:
    """The version that serves now."""
    with Journal.open(site.journal) as journal:
        return journal.pointers("demo").stable


def was_stable(site: Site, version: int) -> bool:
    with Journal.open(site.journal) as journal:
        return any(e.version == version for e in journal.entries("demo", kinds=(PROMOTED,)))


def rollback_drill(site: Site) -> float:
    """`mansard rollback` from the shell, timed whole: milliseconds from start to exit."""
    console.print("[bold]$ mansard rollback --as grace[/bold]")
    began = time.monotonic()
    command = [MANSARD[0], *MANSARD[1:], "rollback", "--as", "grace", "--why", "drill", "--site", str(site.path)]
    subprocess.run(command, check=True)
    return round((time.monotonic() - began) * 1000, 1)


@contextlib.contextmanager
def traffic(site: Site) -> Iterator[Path]:
    """Users who keep asking until the block ends; yields the file of their counts once all of them were seen, because a
    release counts who asked lately."""
    counts = site.run / "traffic.json"
    counts.unlink(missing_ok=True)
    url = f"http://127.0.0.1:{site.ports.router}"
    process = subprocess.Popen([sys.executable, "-m", "flows.demo_traffic", url, "demo", str(counts)])
    try:
        wait_for_requests(counts, 5)
        wait_for_users(site)
        yield counts
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=300)


def wait_until_served(site: Site, deadline_seconds: float = 1800) -> None:
    """After `mansard up` the host starts stable's engine; users come when it answers."""
    deadline = time.monotonic() + deadline_seconds
    while time.monotonic() < deadline:
        told = HostClient(site.host_socket).call("GET", "/status")["models"]["demo"]
        if told["versions"].get(str(told["stable"]), {}).get("state") == "ready":
            return
        time.sleep(0.5)
    raise MansardError(f"the stable version does not answer after {deadline_seconds:.0f} s; see mansard status")


def wait_for_requests(counts: Path, number: int, deadline_seconds: float = 600) -> None:
    deadline = time.monotonic() + deadline_seconds
    while time.monotonic() < deadline:
        if counts.exists() and json.loads(counts.read_text())["requests"] >= number:
            return
        time.sleep(0.2)
    raise MansardError(f"the demo's users made fewer than {number} requests in {deadline_seconds:.0f} s")


def wait_for_users(site: Site, deadline_seconds: float = 600) -> None:
    """Until the router remembers every user of the demo."""
    deadline = time.monotonic() + deadline_seconds
    while asyncio.run(read_users(site, "demo", ())).seen < USERS:
        if time.monotonic() > deadline:
            raise MansardError(f"fewer than {USERS} users had an answer in {deadline_seconds:.0f} s; mansard status")
        time.sleep(0.5)


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
            low, high = suite["interval"]
            out.print(
                f"{role:6} {suite['suite']}: {suite['before']:.3f} -> {suite['after']:.3f} "
                f"(change {low:+.3f} to {high:+.3f})"
            )
    counts = summary["traffic"]
    out.print(f"verdict   {summary['verdict']} (version {summary['version']} is stable)")
    out.print(f"chart     {summary['chart']}")
    out.print(
        f"traffic   {counts['requests']} requests, {counts['failed']} failed, {counts['broken_streams']} broken streams"
    )
    out.print(f"rollback  {summary['rollback_ms']:.0f} ms, the whole command from the shell")
    for name, url in summary["urls"].items():
        out.print(f"{name:9} {url}")
    out.print(f"told in {seconds:.0f} s; the stack keeps running (mansard down stops it); facts: demo-summary.json")


if __name__ == "__main__":
    sys.exit(main())
