"""What each sticky key had from each version: router workers' records, added up for the windows of a rollout.

Guarantees: every record of a worker is read once (a restarted worker is another one); a worker that is there and silent
is known, because a window without its records would be another window; a key counts for the side on which its hash puts
it, so neither a rescue on stable nor a tester who pins a version moves anybody. Does not cover: the test on a sample
(release/analysis.py).
"""

import asyncio
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mansard.errors import MansardError
from mansard.release.analysis import METRICS, Bools, Floats, Sample
from mansard.serving.client import HostClient, HostDown, router_sockets
from mansard.serving.split import BUCKETS_PER_PERCENT, NUM_BUCKETS
from mansard.site import Site

WORKER_TIMEOUT_SECONDS = 5.0
FIELDS = (
    *("decided", "errors", "ended", "seconds", "first_tokens", "first_token_seconds"),
    *("gaps", "gap_seconds", "answers", "output_tokens", "unfinished", "unfinished_seconds"),
    *("answered", "refused"),
)
"""`ended` are successes and requests whose client went away: their time counts, so a hang cannot hide behind clients
that give up. `answers` are successes whose `output_tokens` are known. `answered` are `decided` and `refused`, the
engine's own 4xx."""
_AT = {name: place for place, name in enumerate(FIELDS)}

log = logging.getLogger(__name__)

Table = dict[str, list[float]]
"""Sticky key's digest -> its sums in the order of FIELDS."""


@dataclass(frozen=True, slots=True)
class Record:
    """One version's part of one request, as the router records it. `ended` is on the machine's monotonic clock."""

    ended: float
    model: str
    version: int
    key: str
    outcome: str
    ttft: float | None
    token: float | None
    latency: float
    output_tokens: float | None


@dataclass(slots=True)
class RecordTail:
    """Reads on where it stopped. `in_flight` are (version, key, age) of the model, as of the last reading."""

    site: Site
    model: str
    in_flight: list[tuple[int, str, float]] = field(default_factory=list)
    _cursors: dict[str, tuple[int, int]] = field(default_factory=dict)  # worker -> (pid, number of the last record)

    async def read(self) -> tuple[list[Record], bool]:
        """The model's new records, and whether every worker that runs told its own."""
        paths = router_sockets(self.site)
        told = await asyncio.gather(*(asyncio.to_thread(self._read_worker, path) for path in paths))
        self.in_flight = [waiting for answer in told if answer is not None for waiting in answer[1]]
        return [record for answer in told if answer is not None for record in answer[0]], None not in told

    def _read_worker(self, path: Path) -> tuple[list[Record], list[tuple[int, str, float]]] | None:
        """None for one that is silent; nothing for one that has gone."""
        client = HostClient(path)
        records: list[Record] = []
        pid, after = self._cursors.get(path.name, (0, 0))
        try:
            while True:
                tree = client.call("GET", f"/records?after={after}", timeout_seconds=WORKER_TIMEOUT_SECONDS)
                if tree["pid"] != pid and after:
                    pid, after, records = int(tree["pid"]), 0, []
                    continue
                pid, after = int(tree["pid"]), int(tree["next"])
                records += [Record(*row) for row in tree["records"] if row[1] == self.model]
                if not tree["has_more"]:
                    break
        except HostDown:
            return [], []
        except (MansardError, KeyError, TypeError, ValueError) as error:
            log.warning("%s: its records cannot be read: %s", path.name, error)
            return None
        self._cursors[path.name] = (pid, after)
        return records, [(row[1], row[2], row[3]) for row in tree["in_flight"] if row[0] == self.model]


def add_records(table: Table, records: Iterable[Record]) -> None:
    """Add them to the table's sums."""
    for record in records:
        row = table.get(record.key)
        if row is None:
            row = table[record.key] = [0.0] * len(FIELDS)
        if record.outcome != "cancelled":
            row[_AT["answered"]] += 1
        if record.outcome == "engine_4xx":
            row[_AT["refused"]] += 1
            continue
        is_ok = record.outcome == "ok"
        if is_ok or record.outcome == "error":
            row[0] += 1
            row[1] += not is_ok
        if record.outcome != "error":
            row[2] += 1
            row[3] += record.latency
        if record.ttft is not None:
            row[4] += 1
            row[5] += record.ttft
        if record.token is not None and record.output_tokens is not None:
            row[6] += record.output_tokens - 1
            row[7] += record.token * (record.output_tokens - 1)
        if is_ok and record.output_tokens is not None:
            row[8] += 1
            row[9] += record.output_tokens


def with_in_flight(table: Table, in_flight: Iterable[tuple[int, str, float]], version: int) -> Table:
    """A copy with what is unfinished at the version."""
    found = {key: list(row) for key, row in table.items()}
    for at, key, age in in_flight:
        if at == version:
            row = found.setdefault(key, [0.0] * len(FIELDS))
            row[_AT["unfinished"]] += 1
            row[_AT["unfinished_seconds"]] += age
    return found


def is_canary_key(key: str, weight_percent: int) -> bool:
    """The side on which the router's hash puts a key (mansard/serving/split.py, `choose`)."""
    return int(key, 16) % NUM_BUCKETS < weight_percent * BUCKETS_PER_PERCENT


def make_sample(canary: Table, stable: Table, past: Table, weight_percent: int) -> Sample:
    """Canary against stable; at 100 % each of the canary's keys against its own past."""
    if weight_percent == 100:
        keys = list(canary)
        return _sample([canary[key] for key in keys], [past.get(key) for key in keys], None)
    ours = [key for key in canary if is_canary_key(key, weight_percent)]
    theirs = [key for key in stable if not is_canary_key(key, weight_percent)]
    now = [canary[key] for key in ours] + [stable[key] for key in theirs]
    return _sample(now, [past.get(key) for key in ours + theirs], np.arange(len(now)) < len(ours))


def _sample(now: list[list[float]], past: list[list[float] | None], is_canary: Bools | None) -> Sample:
    nothing = [0.0] * len(FIELDS)
    sums, counts = _metrics(now)
    past_sums, past_counts = _metrics([nothing if row is None else row for row in past])
    return Sample(is_canary, sums, counts, past_sums, past_counts)


def _metrics(rows: list[list[float]]) -> tuple[Floats, Floats]:
    """(sums, counts), a row for each of METRICS and a column for each key."""
    table = np.array(rows, dtype=np.float64).reshape(-1, len(FIELDS)).T
    column = {name: table[place] for name, place in _AT.items()}
    found = {
        "errors": (column["errors"], column["decided"]),
        "first_token": (column["first_token_seconds"], column["first_tokens"]),
        "per_token": (column["gap_seconds"], column["gaps"]),
        "request": (column["seconds"] + column["unfinished_seconds"], column["ended"] + column["unfinished"]),
        "output": (column["output_tokens"], column["answers"]),
        "refused": (column["refused"], column["answered"]),
    }
    ordered = [found[metric.name] for metric in METRICS]
    return np.array([s for s, _ in ordered]), np.array([c for _, c in ordered])


def checked_table(tree: Mapping[str, Any]) -> Table:
    """A table from a file. ValueError or TypeError for another form."""
    table = {f"{int(key, 16):016x}": [float(number) for number in row] for key, row in tree.items()}
    if any(len(row) != len(FIELDS) for row in table.values()):
        raise ValueError(f"a key has other than {len(FIELDS)} numbers")
    return table
