"""What a router worker believes about the split: the newest file it has seen, and whether each canary's lease lives.

Guarantees: a lower term and a damaged file change nothing; a file that could not be read (no descriptor free, a disk
error) is read again at each look, also when nobody writes it again: files are compared by their bytes; a canary whose
lease counter has not changed for `lease_seconds` by this process's own monotonic clock gets no requests until it moves
again. Wall clocks play no part.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from mansard.errors import MansardError
from mansard.serving.split import ModelSplit, Split, is_newer_or_same, parse_split

LEASE_SECONDS = 10.0
"""Design decision 11."""


class SplitProblem:
    """Why the newest split is not in force, None when it is, and since when by the owner's clock."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.text: str | None = None
        self._clock = clock
        self._since = 0.0

    @property
    def seconds(self) -> float:
        """For how long there has been one, whichever; 0 without."""
        return 0.0 if self.text is None else self._clock() - self._since

    def set(self, text: str | None) -> None:
        if self.text is None:
            self._since = self._clock()
        self.text = text


class SplitWatch:
    """Looks at the split file when `poll` is called; that reads a file of about 1 KB (20 us, 2026-12)."""

    def __init__(self, path: Path, lease_seconds: float, clock: Callable[[], float]) -> None:
        self.split = Split()
        self._problem = SplitProblem(clock)
        self._path = path
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._data: bytes | None = None
        self._renewals: dict[str, tuple[tuple[int, int | None, int], float]] = {}

    @property
    def problem(self) -> str | None:
        """Why the file is not the split in memory; None when it is, or when there has been no file yet."""
        return self._problem.text

    @property
    def problem_seconds(self) -> float:
        return self._problem.seconds

    def poll(self) -> bool:
        """Take what is on disk if it is new and not older. True when the split in memory was replaced."""
        try:
            data = self._path.read_bytes()
            if data == self._data:
                self._problem.set(None)
                return False
            split = parse_split(data, str(self._path))
        except OSError as error:
            if self._data is not None or not isinstance(error, FileNotFoundError):
                reason = f"{self._path}: cannot read the traffic split ({error.strerror})"
                self._problem.set(f"{reason}; term {self.split.term} stays in force, and the file is read again")
            return False
        except MansardError as error:
            self._problem.set(str(error))
            return False
        if not is_newer_or_same(split, self.split):
            older = f"{self._path}: term {split.term} is older than term {self.split.term}; ignored"
            self._problem.set(older)
            return False
        self._problem.set(None)
        self.split, self._data = split, data
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
