"""What a router worker believes about the split: the newest file it has seen, and whether each canary's lease lives.

Guarantees: a lower term and a damaged file change nothing; a canary whose lease counter has not changed for
`lease_seconds` by this process's own monotonic clock gets no requests until it moves again. Wall clocks play no part.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from mansard.errors import MansardError
from mansard.serving.split import ModelSplit, Split, is_newer_or_same, parse_split

LEASE_SECONDS = 10.0
"""Design decision 11."""


class SplitWatch:
    """Looks at the split file when `poll` is called; that costs one stat while nothing changes."""

    def __init__(self, path: Path, lease_seconds: float, clock: Callable[[], float]) -> None:
        self.split = Split()
        self.problem: str | None = None
        self._path = path
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._stamp: tuple[int, int, int] | None = None
        self._renewals: dict[str, tuple[tuple[int, int | None, int], float]] = {}

    def poll(self) -> bool:
        """Take what is on disk if it is new and not older. True when the split in memory was replaced.

        `problem` says why a file was not taken, None when the newest file is the one in memory.
        """
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return False
        stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        try:
            split = parse_split(self._path.read_bytes(), str(self._path))
        except FileNotFoundError:
            return False
        except MansardError as error:
            self.problem = str(error)
            return False
        if not is_newer_or_same(split, self.split):
            self.problem = f"{self._path}: term {split.term} is older than term {self.split.term}; ignored"
            return False
        self.problem = None
        self.split = split
        self._renew(split)
        return True

    def has_lease(self, model: str) -> bool:
        """Whether the canary of `model`, if it has one, may serve."""
        known = self.split.models[model]
        if known.canary is None:
            return True
        return self._clock() - self._renewals[model][1] < self._lease_seconds

    def serving(self, model: str) -> ModelSplit:
        """The model's split as requests may use it now: without the canary when its lease has run out."""
        known = self.split.models[model]
        return known if self.has_lease(model) else dataclasses.replace(known, canary=None)

    def _renew(self, split: Split) -> None:
        """A higher term is a sign of life too: some controller, or person, has just written it."""
        now = self._clock()
        for name, model in split.models.items():
            mark = (split.term, model.canary, model.lease_counter)
            if name not in self._renewals or self._renewals[name][0] != mark:
                self._renewals[name] = (mark, now)
