"""What ranks and the stage's process tell each other, as files in the stage's work folder. No torch."""

import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mansard.canonical import write_atomically
from mansard.errors import MansardError

START = "start"
"""The first that a rank says; then it imports, reads text and loads the model."""


@dataclass(frozen=True, slots=True)
class RankBeat:
    """The last that a rank said: it is about to do `what` for the `count`th time something was said."""

    rank: int
    pid: int
    host: str
    what: str
    count: int
    at: float

    @property
    def is_here(self) -> bool:
        return self.host == socket.gethostname()


class RankFiles:
    """Below `work`; `clear` before ranks start."""

    def __init__(self, work: Path) -> None:
        self.folder = work / "ranks"
        self.progress = self.folder / "progress.json"
        self.tensors = self.folder / "learned.safetensors"
        self.learned = self.folder / "learned.json"
        self._followed = self.folder / "followed"
        self._count = 0

    def clear(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in self.folder.iterdir():
            file.unlink()

    def beat(self, rank: int, what: str) -> None:
        self._count += 1
        told = {"rank": rank, "pid": os.getpid(), "host": socket.gethostname(), "what": what, "count": self._count,
                "at": time.time()}  # fmt: skip
        write_atomically(self.folder / f"beat-{rank}.json", json.dumps(told).encode())

    def fail(self, rank: int, error: MansardError, is_victim: bool = False) -> None:
        """`is_victim`: the rank ends because another did."""
        told = {"kind": type(error).__name__, "message": str(error), "victim": is_victim, "at": time.time()}
        write_atomically(self.folder / f"error-{rank}.json", json.dumps(told).encode())

    def alive(self, rank: int) -> None:
        """The process of the rank runs, whatever its training waits for."""
        (self.folder / f"alive-{rank}").touch()

    def seconds_silent(self, rank: int) -> float:
        """Since `alive` was last said."""
        try:
            return time.time() - (self.folder / f"alive-{rank}").stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def follow(self) -> None:
        """The stage's process is there; ranks on other hosts have no other way to know."""
        self._followed.touch()

    def last_followed(self) -> float:
        """By the clock of whoever holds the files; 0.0 before the first time."""
        try:
            return self._followed.stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def beats(self) -> list[RankBeat]:
        return [RankBeat(**json.loads(f.read_text())) for f in sorted(self.folder.glob("beat-*.json"))]

    def errors(self) -> dict[int, dict[str, Any]]:
        """What ranks that failed said, by rank; those that failed by themselves first, then in the order of time."""
        found = {int(f.stem.partition("-")[2]): json.loads(f.read_text()) for f in self.folder.glob("error-*.json")}
        return dict(sorted(found.items(), key=lambda one: (one[1]["victim"], one[1]["at"])))
