"""What became of each request, one record each, for the analysis of a rollout: the last MAX_RECORDS of a worker.

GET /records?after=N on a worker's admin socket gives at most MAX_PER_ANSWER records that ended after number N, oldest
first, and what is still in flight. A reader begins with after=0 for each worker and pid (a restarted worker counts from
zero), asks again with the `next` it was given until `has_more` is false, and knows by `lost` what it came too late for.
Guarantees: a user's sticky key and its tenant leave the router as digests only. Times are seconds of the machine's
monotonic clock, which all its processes share. Not covered: windows and statistics (release/analysis.py).
"""

import itertools
from collections import deque
from dataclasses import dataclass
from typing import Any

FORMAT = 1
MAX_RECORDS = 20_000
MAX_PER_ANSWER = 1_000
"""About 1 ms to write as JSON; longer would hold up streams."""
FIELDS = ("ended", "model", "version", "key", "outcome", "ttft", "token", "latency", "output_tokens", "tenant")


@dataclass(frozen=True, slots=True)
class Ended:
    """One version's part of one request.

    `outcome` is ok, error, engine_4xx or cancelled. `ttft` and `token` (time per output token after the first) are
    those of streams; `token` needs at least two tokens. `output_tokens` are a stream's events, or what a whole answer's
    usage says; behind HAProxy bytes in units of one event. `tenant` is a digest: of an API key's holder, without keys
    of an address. Seconds throughout; None is not known.
    """

    ended: float
    model: str
    version: int
    key: int
    outcome: str
    ttft: float | None
    token: float | None
    latency: float
    output_tokens: float | None
    tenant: int

    def as_json(self) -> list[Any]:
        """In the order of FIELDS."""
        return [
            round(self.ended, 6),
            self.model,
            self.version,
            f"{self.key:016x}",
            self.outcome,
            None if self.ttft is None else round(self.ttft, 6),
            None if self.token is None else round(self.token, 6),
            round(self.latency, 6),
            None if self.output_tokens is None else round(self.output_tokens, 3),
            f"{self.tenant:016x}",
        ]


class Records:
    """A ring of what ended; numbers grow by one from 1."""

    def __init__(self) -> None:
        self._ring: deque[Ended] = deque(maxlen=MAX_RECORDS)
        self._last = 0

    def add(self, ended: Ended) -> None:
        self._ring.append(ended)
        self._last += 1

    def after(self, number: int) -> dict[str, Any]:
        """The part of the answer that is about ended requests. A number from the future counts as 0."""
        first = self._last - len(self._ring)  # the number before the oldest one kept
        start = number if 0 <= number <= self._last else 0
        skipped = max(start - first, 0)
        chosen = list(itertools.islice(self._ring, skipped, skipped + MAX_PER_ANSWER))
        following = max(start, first) + len(chosen)
        return {
            "next": following,
            "has_more": following < self._last,
            "lost": max(first - start, 0),
            "fields": FIELDS,
            "records": [ended.as_json() for ended in chosen],
        }
