"""What stable's users had before, per sticky key, without outages: what a canary at 100 % is compared with.

Records lie in slices of time. A slice counts unless stable's engine was down in it by the journal, or far more of its
requests failed than in the median slice that the journal knows no outage of: a canary must not look well beside one.
Guarantees: of the time before a rollout only the last PAST_SECONDS before its first step count; slices of a rollout are
added up as they end and the median is of the last PAST_SECONDS, so memory grows with users, not with time. Not covered,
where the journal knows nothing of it: an outage of more than half of the time, which is what is normal then; one with
fewer than MIN_EXCESS failures a slice. Nor slow answers without failures.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

from mansard.serving.host.sticky_keys import FIELDS, Record, Table, add_records

SLICE_SECONDS = 10.0
PAST_SECONDS = 3600.0
"""Load changes with the hour of the day; a worker remembers 20,000 records anyway, often less than an hour."""
PAST_SLICES = int(PAST_SECONDS / SLICE_SECONDS)
MIN_EXCESS = 5
EXCESS_SIGMAS = 5.0
"""A slice without an outage exceeds both once in a million times, so leaving slices out makes the past no better."""
EDGE_SECONDS = 1.0
"""Requests fail a moment before the host hears that their engine ended."""
_DECIDED, _ERRORS = FIELDS.index("decided"), FIELDS.index("errors")

Interval = tuple[float, float]
"""From and to, on the machine's monotonic clock."""


@dataclass(slots=True)
class Past:
    """`slices` are by number; `folded` is the sum of those that `fold` took. `shares` (requests decided, errors) are of
    every slice of the last PAST_SECONDS and of those that wait to be folded."""

    slices: dict[int, Table] = field(default_factory=dict)
    folded: Table = field(default_factory=dict)
    shares: dict[int, tuple[float, float]] = field(default_factory=dict)

    def add(self, records: Iterable[Record]) -> None:
        by_slice: dict[int, list[Record]] = {}
        for record in records:
            by_slice.setdefault(int(record.ended // SLICE_SECONDS), []).append(record)
        for number, members in by_slice.items():
            add_records(self.slices.setdefault(number, {}), members)
            rows = self.slices[number].values()
            self.shares[number] = (sum(r[_DECIDED] for r in rows), sum(r[_ERRORS] for r in rows))

    def fold(self, now: float, outages: Sequence[Interval]) -> None:
        """Add up the slices that ended a slice ago or earlier, and forget those that do not count."""
        last = int(now // SLICE_SECONDS) - 2
        numbers = [number for number in self.slices if number <= last]
        for number in self._normal(numbers, outages):
            self.folded = add_tables(self.folded, self.slices[number])
        for number in numbers:
            del self.slices[number]
        self.shares = {n: share for n, share in self.shares.items() if n > last - PAST_SLICES or n in self.slices}

    def table(self, outages: Sequence[Interval]) -> Table:
        """The sum of what counts. Of slices that were not folded, the last PAST_SECONDS."""
        first = max(self.slices, default=0) - PAST_SLICES
        total = self.folded
        for number in self._normal([n for n in self.slices if n > first], outages):
            total = add_tables(total, self.slices[number])
        return total

    def _normal(self, numbers: Iterable[int], outages: Sequence[Interval]) -> list[int]:
        up = {n: share for n, share in self.shares.items() if not _has_outage(n, outages)}
        shares = [errors / decided for decided, errors in up.values() if decided]
        usual = median(shares) if shares else 0.0
        return [n for n in numbers if n in up and not _is_excess(*up[n], usual)]


def add_tables(one: Table, other: Table) -> Table:
    """The sums of both; neither changes."""
    total = dict(one)
    for key, row in other.items():
        total[key] = [a + b for a, b in zip(total[key], row, strict=True)] if key in total else row
    return total


def _has_outage(number: int, outages: Sequence[Interval]) -> bool:
    begin, end = number * SLICE_SECONDS, (number + 1) * SLICE_SECONDS
    return any(start - EDGE_SECONDS < end and begin < stop + EDGE_SECONDS for start, stop in outages)


def _is_excess(decided: float, errors: float, usual: float) -> bool:
    deviation = math.sqrt(decided * usual * (1 - usual))
    return errors > decided * usual + EXCESS_SIGMAS * deviation + MIN_EXCESS
