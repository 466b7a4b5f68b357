"""Which split each data plane serves: router workers, or HAProxy's driver, over their admin sockets.

Guarantees: a process that is there and does not answer (no free descriptor, a hang) is named, never taken for gone;
one that nobody listens for is gone and serves nobody. Waits no longer than told. Standard library only: the on-call
commands import it.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mansard.errors import MansardError
from mansard.serving.client import HostClient, HostDown, is_nobody_there, router_sockets
from mansard.serving.split import Split, read_split, split_digest
from mansard.site import Site

CONFIRM_SECONDS = 2.0
"""A worker sees a new split in milliseconds; after that it is named."""
ANSWER_SECONDS = 1.0
POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class WorkerSplit:
    """What one worker serves. `term` is None for one that did not answer, `problem` says why it is behind."""

    worker: str
    term: int | None
    digest: str
    problem: str
    problem_seconds: float

    def serves(self, split: Split) -> bool:
        """Whether it serves `split` or one of a later term."""
        if self.term is None or self.term != split.term:
            return self.term is not None and self.term > split.term
        return self.digest == split_digest(split)

    def lag(self, split: Split) -> str:
        """One line about a worker that serves another split than `split`."""
        if self.term is None:
            return f"router worker {self.worker}: does not tell which split it serves ({self.problem})"
        since = f", for {self.problem_seconds:.0f} s: {self.problem}" if self.problem else ""
        return f"router worker {self.worker}: serves the split of term {self.term}, not term {split.term}{since}"

    def as_json(self, split: Split) -> dict[str, Any]:
        """For `mansard status --json`."""
        return {
            "worker": self.worker,
            "term": self.term,
            "digest": self.digest,
            "serves_newest": self.serves(split),
            "problem": self.problem,
            "problem_seconds": self.problem_seconds,
        }


def worker_splits(site: Site, timeout_seconds: float) -> list[WorkerSplit]:
    """Of every data plane process that is there; each is given `timeout_seconds` to answer."""
    answers = (_ask(path, timeout_seconds) for path in router_sockets(site))
    return [answer for answer in answers if answer is not None]


def lagging_workers(site: Site, term: int, timeout_seconds: float = CONFIRM_SECONDS) -> list[str]:
    """Wait until every worker serves the split on disk; one line for each that does not in time.

    Where the split on disk is older than `term` or cannot be read, workers are held to `term` alone.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        split = _newest(site, term)
        paths = router_sockets(site)
        share = max((deadline - time.monotonic()) / max(len(paths), 1), POLL_SECONDS)
        behind = [w for w in worker_splits(site, min(share, ANSWER_SECONDS)) if not _is_up(w, split, term)]
        if not behind or time.monotonic() > deadline:
            return [worker.lag(split) for worker in behind]
        time.sleep(POLL_SECONDS)


def _newest(site: Site, term: int) -> Split:
    try:
        split = read_split(site.split_file)
    except (MansardError, OSError):
        return Split(term)
    return split if split.term >= term else Split(term)


def _is_up(worker: WorkerSplit, split: Split, term: int) -> bool:
    if not split.models:
        return worker.term is not None and worker.term >= term
    return worker.serves(split)


def _ask(path: Path, timeout_seconds: float) -> WorkerSplit | None:
    """None where nobody listens on the socket."""
    index = path.stem.removeprefix("router-")
    try:
        tree = HostClient(path).call("GET", "/observations", timeout_seconds=timeout_seconds)
        problem, seconds = tree["split_problem"] or "", float(tree["split_problem_seconds"])
        return WorkerSplit(index, int(tree["term"]), str(tree["split_digest"]), problem, seconds)
    except HostDown as error:
        return None if is_nobody_there(error) else WorkerSplit(index, None, "", str(error), 0.0)
    except (MansardError, KeyError, TypeError, ValueError) as error:
        return WorkerSplit(index, None, "", str(error), 0.0)


def lag_lines(site: Site, timeout_seconds: float) -> tuple[list[dict[str, Any]], list[str]]:
    """For `mansard status`: every worker's split, and a line for each that serves another one than that on disk."""
    try:
        split = read_split(site.split_file)
    except (MansardError, OSError) as error:
        return [], [f"traffic split: cannot be read ({error}); workers keep what they serve; mend it with: mansard up"]
    workers = worker_splits(site, timeout_seconds)
    lines = [worker.lag(split) for worker in workers if not worker.serves(split)]
    return [worker.as_json(split) for worker in workers], lines
