"""A story told by the commands that a person would type: what `make demo` and `make example` share.

Every step is a command of its own, whose progress goes to the terminal; what ran before is found again. Users who ask
through the router all the while are counted.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from flows.demo_traffic import USERS
from mansard.errors import MansardError
from mansard.release.events import PROMOTED
from mansard.release.journal import Journal
from mansard.serving.client import HostClient
from mansard.serving.host.release_users import read_users
from mansard.site import Site

MANSARD = [sys.executable, "-m", "flows.cli"]
console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Story:
    """A site and the one model name that the story is about. ada asks for versions, grace decides."""

    site: Site
    model: str

    def make_keys(self) -> None:
        for person in ("ada", "grace"):
            if not (self.site.keys / f"{person}.key").exists():
                self.run("keygen", person)

    def run(self, verb: str, *words: object) -> None:
        """Run a command as a person would; its output is theirs, on standard error."""
        show_command(verb, *words)
        command = [*MANSARD, verb, *map(str, words), "--site", str(self.site.path)]
        subprocess.run(command, stdout=sys.stderr, check=True)

    def run_json(self, verb: str, *words: object, statuses: Sequence[int] = (0,)) -> dict[str, Any]:
        """Run a command with --json and return what it printed; progress stays on standard error. `statuses` are the
        exit codes that are answers."""
        show_command(verb, *words)
        command = [*MANSARD, verb, *map(str, words), "--site", str(self.site.path), "--json"]
        finished = subprocess.run(command, stdout=subprocess.PIPE)
        if finished.returncode not in statuses:
            raise subprocess.CalledProcessError(finished.returncode, command)
        answer: dict[str, Any] = json.loads(finished.stdout)
        return answer

    def approve(self, version: int, reason: str) -> None:
        self.run("approve", version, "--reason", reason, "--as", "grace")

    def release(self, version: int) -> None:
        self.run("release", version, "--as", "ada")

    def stable_version(self) -> int | None:
        """The version that serves now."""
        with Journal.open(self.site.journal) as journal:
            return journal.pointers(self.model).stable

    def was_stable(self, version: int) -> bool:
        with Journal.open(self.site.journal) as journal:
            return any(e.version == version for e in journal.entries(self.model, kinds=(PROMOTED,)))

    def rollback_ms(self) -> float:
        """`mansard rollback` from the shell, timed whole: milliseconds from start to exit."""
        began = time.monotonic()
        self.run("rollback", "--as", "grace", "--why", "drill")
        return round((time.monotonic() - began) * 1000, 1)

    @contextlib.contextmanager
    def traffic(self, prompts: Sequence[str] = ()) -> Iterator[Path]:
        """Users who keep asking until the block ends (the demo's prompts, where none are named); yields the file of
        their counts once all of them had an answer, because a release counts who asked lately."""
        counts = self.site.run / "traffic.json"
        counts.unlink(missing_ok=True)
        url = f"http://127.0.0.1:{self.site.ports.router}"
        process = subprocess.Popen([sys.executable, "-m", "flows.demo_traffic", url, self.model, str(counts), *prompts])
        try:
            wait_for_requests(counts, 5)
            self.wait_for_users()
            yield counts
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=300)

    def wait_for_users(self, deadline_seconds: float = 600) -> None:
        """Until the router remembers every user of the traffic."""
        deadline = time.monotonic() + deadline_seconds
        while asyncio.run(read_users(self.site, self.model, ()))[1].named < USERS:
            if time.monotonic() > deadline:
                raise MansardError(f"fewer than {USERS} users had an answer in {deadline_seconds:.0f} s")
            time.sleep(0.5)

    def wait_until_served(self, deadline_seconds: float = 1800) -> None:
        """After `mansard up` the host starts stable's engine; users come when it answers."""
        deadline = time.monotonic() + deadline_seconds
        while time.monotonic() < deadline:
            status = HostClient(self.site.host_socket).call("GET", "/status")["models"][self.model]
            if status["versions"].get(str(status["stable"]), {}).get("state") == "ready":
                return
            time.sleep(0.5)
        raise MansardError(f"the stable version does not answer after {deadline_seconds:.0f} s; see mansard status")


def show_command(verb: str, *words: object) -> None:
    """What a person would type."""
    line = f"$ mansard {verb} {' '.join(map(shown, words))}".rstrip()
    console.print(line, style="bold", markup=False, highlight=False, soft_wrap=True)


def line(out: Console, text: str) -> None:
    """Paths and addresses stay whole, so that they can be copied; brackets are no markup."""
    out.print(text, markup=False, soft_wrap=True)


def alarm(text: str) -> None:
    """Why the story ended early; an error's brackets are no markup."""
    console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)


def shown(word: object) -> str:
    text = os.path.relpath(word) if isinstance(word, Path) else str(word)
    return f'"{text}"' if " " in text else text


def wait_for_requests(counts: Path, number: int, deadline_seconds: float = 600) -> None:
    deadline = time.monotonic() + deadline_seconds
    while time.monotonic() < deadline:
        if counts.exists() and json.loads(counts.read_text())["requests"] >= number:
            return
        time.sleep(0.2)
    raise MansardError(f"the users made fewer than {number} requests in {deadline_seconds:.0f} s")
