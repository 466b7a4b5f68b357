"""`kill -9` at a moment: what is killed, when, and what is left afterwards. Linux only (/proc)."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mansard.release.journal import Journal
from mansard.site import Site

Whom = Literal["worker", "command", "both"]
WHOM: tuple[Whom, ...] = ("worker", "command", "both")
ANYWHERE, REGISTERED = "anywhere", "registered"
POLL_SECONDS = 0.01
ENDED_SECONDS = 120.0
"""Generous: what was killed, or lost its parent, ends at once on an idle machine."""


@dataclass(frozen=True, slots=True)
class Kill:
    """`moment`: a stage whose process works; `registered`: the version is in the journal and not yet published;
    `anywhere`. `fraction` of the stage's usual seconds pass first. Where no worker works, its kill hits the command."""

    moment: str
    whom: Whom
    fraction: float


def plan_kills(seed: int) -> list[list[Kill]]:
    """The kills of one upgrade that has to ask the engines, and of two whose engines' answers are known."""
    chance = random.Random(seed)
    upgrades = [_kills_of_the_work(chance), _kills_of_the_work(chance)]
    asking = [("evaluate", w) for w in chance.sample(WHOM, 3)] + [("fingerprint", chance.choice(WHOM))]
    asking += [("cost", w) for w in chance.sample(WHOM, 2)] + [("judge", chance.choice(WHOM))]
    return [[*(Kill(m, w, chance.random()) for m, w in asking), Kill(REGISTERED, "command", 0.0)], *upgrades]


def _kills_of_the_work(chance: random.Random) -> list[Kill]:
    def at(stage: str, times: int = 1) -> list[Kill]:
        return [Kill(stage, whom, chance.random()) for whom in chance.sample(WHOM, times)]

    # Not the worker of the proof alone: the training beside it would go on to its end before the command fails.
    proof = Kill("prove", chance.choice(("command", "both")), chance.random())
    first, *more = [Kill(ANYWHERE, whom, chance.random()) for whom in WHOM]
    begun = [first, *at("check"), *at("contamination"), *at("expand"), proof, *at("tokenize", 2)]
    begun += [*at("train", 3), *more]
    return [*begun, *at("fuse"), *at("quantize", 2), *at("judge"), Kill(REGISTERED, "command", 0.0)]


def strike(kill: Kill, command: "subprocess.Popen[bytes]", site: Site, usual_seconds: Mapping[str, float]) -> bool:
    """Wait for the moment and kill; False when the command ended before it came."""
    if kill.moment == ANYWHERE:
        delay_seconds = kill.fraction * usual_seconds[ANYWHERE]
    else:
        while not _has_come(kill.moment, site):
            if command.poll() is not None:
                return False
            time.sleep(POLL_SECONDS)
        delay_seconds = 0.9 * kill.fraction * usual_seconds.get(kill.moment, 0.0)
    try:
        command.wait(delay_seconds)
    except subprocess.TimeoutExpired:
        kill_now(kill.whom, command, site)
        return True
    return False


def kill_now(whom: Whom, command: "subprocess.Popen[bytes]", site: Site) -> None:
    """SIGKILL to one process each, never to its group: who is left has to end by itself."""
    working = workers(site)
    victims = {"worker": working or [command.pid], "command": [command.pid], "both": [command.pid, *working]}[whom]
    for pid in victims:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it ended in this moment


def _has_come(moment: str, site: Site) -> bool:
    if moment == REGISTERED:
        with Journal.open(site.journal) as journal:
            return len(journal.versions("demo")) > 1
    return bool(workers(site, moment))


def workers(site: Site, stage: str = "") -> list[int]:
    """Processes `python -m mansard.worker STAGE` of this site."""
    logs = str(site.logs).encode()
    found = []
    for pid, words in _command_lines():
        if b"mansard.worker" in words and words[-1].startswith(logs) and stage.encode() in (b"", words[-2]):
            found.append(pid)
    return found


def processes_of(site: Site) -> list[int]:
    """Everything that a command of this site started: its workers and whatever they started inherit its variables."""
    mark, own = f"PREFECT_HOME={site.home}/".encode(), str(site.path).encode()
    found = []
    for pid, words in _command_lines():
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if mark in variables or own in words:
            found.append(pid)
    return found


def left_over(site: Site) -> list[int]:
    """Processes of the site that live although they had time to end; they are ended here, so that they count once."""
    deadline = time.monotonic() + ENDED_SECONDS
    while (found := processes_of(site)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    return found


def _command_lines() -> list[tuple[int, Sequence[bytes]]]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if len(words) > 1:  # zombies and kernel threads have no command line
                found.append((int(entry.name), words))
    return found
