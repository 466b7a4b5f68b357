"""What a router worker saw, per model and version: plain counters on the hot path, read as JSON.

Guarantees: a request is counted once for each version that was asked, when that version's part of it ended. An error is
a refused connection, an engine that died, a 5xx or a broken stream; a rescue is an error after which stable was asked.
An engine's 4xx and a client that went away are neither errors nor successes; the router's own 4xx belong to no version.
Bodies are not parsed: a stream's tokens are its events, counted by their `data: `.
"""

import itertools
import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Self

from mansard.serving.router.records import Ended, Records

FORMAT = 1
BOUNDS_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
OUTCOMES = ("ok", "error", "engine_4xx", "cancelled")
MAX_IN_FLIGHT_TOLD = 1_000
MAX_TENANTS_TOLD = 16
"""In a run of failures; it is long enough by then, whoever they are."""
_EVENT = b"data: "
_DONE = b"data: [DONE]"
_USAGE = b'"completion_tokens":'


class Histogram:
    """Counts of seconds between BOUNDS_SECONDS; the last count is of what is above them all."""

    __slots__ = ("counts", "total_seconds")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_SECONDS) + 1)
        self.total_seconds = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS_SECONDS, seconds)] += 1
        self.total_seconds += seconds

    def as_json(self) -> dict[str, Any]:
        return {"counts": self.counts, "total_seconds": self.total_seconds}


class VersionCounts:
    """One version of one model. `waiting` and `streaming` hold what is in flight, oldest first."""

    def __init__(self) -> None:
        self.ok = self.errors = self.engine_4xx = self.cancelled = self.rescues = self.streams = 0
        self.output_tokens: float = 0
        self.consecutive_failures = 0
        self.failures_of_tenants = Counter[int]()
        self.last_error = ""
        self.ttft = Histogram()
        self.token = Histogram()
        self.latency = Histogram()
        self.waiting: dict[int, Attempt] = {}
        self.streaming: dict[int, Attempt] = {}

    def streamed(self, first_seconds: float) -> None:
        """A stream whose first byte came after so many seconds."""
        self.streams += 1
        self.ttft.add(first_seconds)

    def as_json(self, now: float) -> dict[str, Any]:
        starts = [next(iter(ages.values())).start for ages in (self.waiting, self.streaming) if ages]
        return {
            "requests": self.ok + self.errors + self.engine_4xx + self.cancelled,
            "ok": self.ok,
            "errors": self.errors,
            "rescues": self.rescues,
            "engine_4xx": self.engine_4xx,
            "cancelled": self.cancelled,
            "streams": self.streams,
            "output_tokens": self.output_tokens,
            "consecutive_failures": self.consecutive_failures,
            "failures_of_tenants": sorted(self.failures_of_tenants.values()),
            "last_error": self.last_error,
            "in_flight": len(self.waiting) + len(self.streaming),
            "waiting": len(self.waiting),
            "oldest_in_flight_seconds": now - min(starts, default=now),
            "oldest_waiting_seconds": now - next(iter(self.waiting.values())).start if self.waiting else 0.0,
            "ttft": self.ttft.as_json(),
            "token": self.token.as_json(),
            "latency": self.latency.as_json(),
        }


class Attempt:
    """One version's part of one request, as a context manager: it ends as `cancelled` unless it was told otherwise."""

    __slots__ = (
        *("_first_seconds", "_last", "_number", "_observations", "_outcome", "_problem"),
        *("counts", "key", "model", "output_tokens", "start", "tenant", "version"),
    )

    def __init__(
        self,
        observations: "Observations",
        counts: VersionCounts,
        number: int,
        model: str,
        version: int,
        key: int,
        tenant: int,
    ) -> None:
        self._observations = observations
        self.counts = counts
        self.model, self.version, self.key, self.tenant = model, version, key, tenant
        self.start = self._last = observations.clock()
        self.output_tokens: int | None = None
        self._number = number
        self._first_seconds: float | None = None
        self._outcome = "cancelled"
        self._problem = ""

    def __enter__(self) -> Self:
        self.counts.waiting[self._number] = self
        return self

    @property
    def is_streaming(self) -> bool:
        return self._first_seconds is not None

    def as_line(self) -> dict[str, Any]:
        """For the access log."""
        ttft = None if self._first_seconds is None else round(self._first_seconds * 1000, 3)
        return {
            "version": self.version,
            "outcome": self._outcome,
            "ttft_ms": ttft,
            "output_tokens": self.output_tokens,
            "problem": self._problem[:200],
        }

    def first_byte(self) -> None:
        """The first byte of a stream is there: time to first token, from the whole request to here."""
        counts = self.counts
        self._last = self._observations.clock()
        self._first_seconds = self._last - self.start
        self.output_tokens = 0
        counts.streamed(self._first_seconds)
        counts.streaming[self._number] = counts.waiting.pop(self._number)

    def streamed(self, data: bytes) -> None:
        """A piece of a stream, as it is handed on. The mark at its end is no token and takes no time."""
        assert self.output_tokens is not None, "first_byte comes first"
        events = data.count(_EVENT) - (_DONE in data[-20:])
        if events > 0:
            self.output_tokens += events
            self._last = self._observations.clock()

    def answered(self, status: int) -> None:
        """The engine answered to the end, with a status below 500."""
        self._outcome = "ok" if status < 400 else "engine_4xx"

    def whole(self, body: bytes) -> None:
        """A whole answer's body: its usage, when it tells one, stands near its end."""
        _, found, rest = body[-2048:].rpartition(_USAGE)
        digits = rest.lstrip()[:12].partition(b",")[0].rstrip(b"} \n") if found else b""
        if digits.isdigit():
            self.output_tokens = int(digits)

    def failed(self, problem: str) -> None:
        self._outcome, self._problem = "error", problem

    def rescued(self) -> None:
        """Stable is asked after this failure."""
        self.counts.rescues += 1

    def __exit__(self, *raised: object) -> None:
        now = self._observations.clock()
        self.counts.waiting.pop(self._number, None)
        self.counts.streaming.pop(self._number, None)
        ended = Ended(
            *(now, self.model, self.version, self.key, self._outcome),
            *(self._first_seconds, self._token_seconds(), now - self.start, self.output_tokens, self.tenant),
        )
        self._observations.add(ended, self._problem)

    def _token_seconds(self) -> float | None:
        if self._first_seconds is None or self.output_tokens is None or self.output_tokens < 2:
            return None
        return (self._last - self.start - self._first_seconds) / (self.output_tokens - 1)


class Observations:
    """Everything one worker counts. The clock is monotonic."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.records = Records()
        self._numbers = itertools.count()
        self._started = clock()
        self.versions: dict[tuple[str, int], VersionCounts] = {}
        self.refused: Counter[int] = Counter()
        """The router's own answers by status: bad keys, unknown paths, too large, too many, no version."""
        self.in_flight = 0
        self.clients_left = 0
        """Clients that went away before their answer's end."""

    def counts(self, model: str, version: int) -> VersionCounts:
        counts = self.versions.get((model, version))
        if counts is None:
            counts = self.versions[model, version] = VersionCounts()
        return counts

    def attempt(self, model: str, version: int, key: int, tenant: int) -> Attempt:
        """`key` is the digest of the sticky key, `tenant` that of whose it is."""
        return Attempt(self, self.counts(model, version), next(self._numbers), model, version, key, tenant)

    def set_in_flight(self, model: str, found: Iterable[tuple[int, int, float, bool, int]]) -> None:
        """All that the model has in flight, as (version, key, start, whether its answer has begun, tenant), where the
        worker does not pass it on itself."""
        for (name, _), counts in self.versions.items():
            if name == model:
                counts.waiting.clear()
                counts.streaming.clear()
        self.in_flight = 0
        for version, key, start, is_streaming, tenant in sorted(found, key=lambda one: one[2]):
            attempt = self.attempt(model, version, key, tenant)
            attempt.start = start
            (attempt.counts.streaming if is_streaming else attempt.counts.waiting)[self.in_flight] = attempt
            self.in_flight += 1

    def add(self, ended: Ended, problem: str) -> None:
        """What ended joins the counts and the records. `problem` is an error's."""
        counts = self.counts(ended.model, ended.version)
        if ended.outcome == "ok":
            counts.ok += 1
            counts.consecutive_failures = 0
            counts.failures_of_tenants.clear()
            counts.latency.add(ended.latency)
            counts.output_tokens += ended.output_tokens or 0
            if ended.token is not None:
                counts.token.add(ended.token)
        elif ended.outcome == "error":
            counts.errors += 1
            counts.consecutive_failures += 1
            if len(counts.failures_of_tenants) < MAX_TENANTS_TOLD:
                counts.failures_of_tenants[ended.tenant] += 1
            counts.last_error = problem[:300]
        elif ended.outcome == "engine_4xx":
            counts.engine_4xx += 1
        else:
            counts.cancelled += 1
        self.records.add(ended)

    def as_json(self, term: int, leases: dict[str, bool], problem: str | None) -> dict[str, Any]:
        """GET /observations."""
        now = self.clock()
        models: dict[str, Any] = {name: {"has_lease": alive, "versions": {}} for name, alive in leases.items()}
        for (model, version), counts in sorted(self.versions.items()):
            versions = models.setdefault(model, {"has_lease": True, "versions": {}})["versions"]
            versions[str(version)] = counts.as_json(now)
        return {
            "format": FORMAT,
            "term": term,
            "pid": os.getpid(),
            "uptime_seconds": now - self._started,
            "in_flight": self.in_flight,
            "refused": {str(status): count for status, count in sorted(self.refused.items())},
            "clients_left": self.clients_left,
            "split_problem": problem,
            "bounds_seconds": list(BOUNDS_SECONDS),
            "models": models,
        }

    def records_as_json(self, after: int) -> dict[str, Any]:
        """GET /records: what ended after that number, and the oldest of what is in flight."""
        now = self.clock()
        attempts = [a for c in self.versions.values() for kept in (c.waiting, c.streaming) for a in kept.values()]
        oldest = sorted(attempts, key=lambda attempt: attempt.start)[:MAX_IN_FLIGHT_TOLD]
        in_flight = [
            [a.model, a.version, f"{a.key:016x}", round(now - a.start, 6), a.is_streaming, f"{a.tenant:016x}"]
            for a in oldest
        ]
        return {
            "format": FORMAT,
            "pid": os.getpid(),
            "now": now,
            **self.records.after(after),
            "in_flight_fields": ["model", "version", "key", "age", "is_streaming", "tenant"],
            "in_flight": in_flight,
        }
