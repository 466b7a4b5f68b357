"""What each sticky key had from each version: router workers' records, added up for the windows of a rollout.

A user is a sticky key within a tenant: the same name from two addresses, where nobody needs a key, is two. Guarantees:
every record of a worker is read once (a restarted worker is another one); a worker that is there and silent
is known, because a window without its records would be another window; a key counts for the side on which its hash puts
it, so neither a rescue on stable nor a tester who pins a version moves anybody. Does not cover: the test on a sample
(release/analysis.py).
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mansard.errors import MansardError
from mansard.release.analysis import METRICS, Bools, Floats, Ints, Sample
from mansard.serving.client import HostClient, HostDown, router_sockets
from mansard.serving.split import BUCKETS_PER_PERCENT, bucket_of
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

MAX_USERS_OF_TENANT = 5_000
MAX_USERS = 50_000
"""In a table, which takes 20 MB then; later users are left out. One tenant may invent names, and not fill it."""

Table = dict[str, list[float]]
"""User (digests of sticky key and tenant) -> its sums in the order of FIELDS."""


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
    tenant: str

    @property
    def user(self) -> str:
        return user_named(self.key, self.tenant)


@dataclass(slots=True)
class RecordTail:
    """Reads on where it stopped. `in_flight` are (version, user, age) of the model, as of the last reading."""

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
        return records, [
            (row[1], user_named(row[2], row[5]), row[3]) for row in tree["in_flight"] if row[0] == self.model
        ]


def add_records(table: Table, records: Iterable[Record]) -> None:
    """Add them to the table's sums."""
    new = list(records)
    is_large = len(table) + len(new) > MAX_USERS_OF_TENANT
    numbers = Counter(tenant_of(user) for user in table) if is_large else Counter[str]()
    for record in new:
        user = record.user
        row = table.get(user)
        if row is None:
            numbers[record.tenant] += 1
            if numbers[record.tenant] > MAX_USERS_OF_TENANT or len(table) >= MAX_USERS:
                continue
            row = table[user] = [0.0] * len(FIELDS)
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
    for at, user, age in in_flight:
        if at == version:
            row = found.setdefault(user, [0.0] * len(FIELDS))
            row[_AT["unfinished"]] += 1
            row[_AT["unfinished_seconds"]] += age
    return found


def user_named(key: str, tenant: str) -> str:
    """A table's name for a user: the digests of its sticky key and of its tenant."""
    return f"{key}.{tenant}"


def tenant_of(user: str) -> str:
    return user.rpartition(".")[2]


def tenant_numbers(users: Iterable[str]) -> Ints:
    """A number for each user's tenant."""
    return np.array([int(tenant_of(user), 16) >> 1 for user in users], dtype=np.int64)


def is_canary_user(user: str, weight_percent: int, salt: str) -> bool:
    """The side on which the router's hash puts a user (mansard/serving/split.py, `choose`)."""
    return bucket_of(int(user.partition(".")[0], 16), salt) < weight_percent * BUCKETS_PER_PERCENT


def make_sample(canary: Table, stable: Table, past: Table, weight_percent: int, salt: str) -> Sample:
    """Canary against stable; at 100 % each of the canary's keys against its own past."""
    if weight_percent == 100:
        return _sample(list(canary), list(canary.values()), past, None)
    ours = [user for user in canary if is_canary_user(user, weight_percent, salt)]
    theirs = [user for user in stable if not is_canary_user(user, weight_percent, salt)]
    now = [canary[user] for user in ours] + [stable[user] for user in theirs]
    return _sample(ours + theirs, now, past, np.arange(len(now)) < len(ours))


def _sample(users: list[str], now: list[list[float]], past: Table, is_canary: Bools | None) -> Sample:
    nothing = [0.0] * len(FIELDS)
    sums, counts = _metrics(now)
    past_sums, past_counts = _metrics([past.get(user, nothing) for user in users])
    return Sample(is_canary, sums, counts, past_sums, past_counts, tenant_numbers(users))


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
    table = {}
    for user, row in tree.items():
        key, _, tenant = user.partition(".")
        table[user_named(f"{int(key, 16):016x}", f"{int(tenant, 16):016x}")] = [float(number) for number in row]
    if any(len(row) != len(FIELDS) for row in table.values()):
        raise ValueError(f"a user has other than {len(FIELDS)} numbers")
    return table
