"""What a router worker saw, per model and version: plain counters on the hot path, read as JSON or as Prometheus text.

Guarantees: a request is counted once for each version that was asked, when that version's part of it ended. An error is
a refused connection, an engine that died, a 5xx or a broken stream; a rescue is an error after which stable was asked.
An engine's 4xx and a client that went away are neither errors nor successes; the router's own 4xx belong to no version.
"""

import itertools
import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Self

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

FORMAT = 1
BOUNDS_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
OUTCOMES = ("ok", "error", "engine_4xx", "cancelled")


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
    """One version of one model. `waiting` and `streaming` hold the start times of what is in flight, oldest first."""

    def __init__(self) -> None:
        self.ok = self.errors = self.engine_4xx = self.cancelled = self.rescues = self.streams = 0
        self.consecutive_failures = 0
        self.last_error = ""
        self.ttft = Histogram()
        self.latency = Histogram()
        self.waiting: dict[int, float] = {}
        self.streaming: dict[int, float] = {}

    def as_json(self, now: float) -> dict[str, Any]:
        starts = [next(iter(ages.values())) for ages in (self.waiting, self.streaming) if ages]
        waits = next(iter(self.waiting.values()), now)
        return {
            "requests": self.ok + self.errors + self.engine_4xx + self.cancelled,
            "ok": self.ok,
            "errors": self.errors,
            "rescues": self.rescues,
            "engine_4xx": self.engine_4xx,
            "cancelled": self.cancelled,
            "streams": self.streams,
            "consecutive_failures": self.consecutive_failures,
            "last_error": self.last_error,
            "in_flight": len(self.waiting) + len(self.streaming),
            "oldest_in_flight_seconds": now - min(starts, default=now),
            "oldest_waiting_seconds": now - waits,
            "ttft": self.ttft.as_json(),
            "latency": self.latency.as_json(),
        }


class Attempt:
    """One version's part of one request, as a context manager: it ends as `cancelled` unless it was told otherwise."""

    __slots__ = ("_clock", "_counts", "_number", "_outcome", "_problem", "_start")

    def __init__(self, counts: VersionCounts, number: int, clock: Callable[[], float]) -> None:
        self._counts = counts
        self._number = number
        self._clock = clock
        self._start = clock()
        self._outcome = "cancelled"
        self._problem = ""

    def __enter__(self) -> Self:
        self._counts.waiting[self._number] = self._start
        return self

    def first_byte(self) -> None:
        """The first byte of a stream is there: time to first token, from the whole request to here."""
        counts = self._counts
        counts.streams += 1
        counts.ttft.add(self._clock() - self._start)
        counts.streaming[self._number] = counts.waiting.pop(self._number)

    def answered(self, status: int) -> None:
        """The engine answered to the end, with a status below 500."""
        self._outcome = "ok" if status < 400 else "engine_4xx"

    def failed(self, problem: str) -> None:
        self._outcome, self._problem = "error", problem

    def rescued(self) -> None:
        """Stable is asked after this failure."""
        self._counts.rescues += 1

    def __exit__(self, *raised: object) -> None:
        counts = self._counts
        counts.waiting.pop(self._number, None)
        counts.streaming.pop(self._number, None)
        if self._outcome == "ok":
            counts.ok += 1
            counts.consecutive_failures = 0
            counts.latency.add(self._clock() - self._start)
        elif self._outcome == "error":
            counts.errors += 1
            counts.consecutive_failures += 1
            counts.last_error = self._problem[:300]
        elif self._outcome == "engine_4xx":
            counts.engine_4xx += 1
        else:
            counts.cancelled += 1


class Observations:
    """Everything one worker counts. The clock is monotonic."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._numbers = itertools.count()
        self._started = clock()
        self.versions: dict[tuple[str, int], VersionCounts] = {}
        self.refused: Counter[int] = Counter()
        """The router's own answers by status: bad keys, unknown paths, too large, too many, no version."""
        self.in_flight = 0

    def attempt(self, model: str, version: int) -> Attempt:
        key = (model, version)
        counts = self.versions.get(key)
        if counts is None:
            counts = self.versions[key] = VersionCounts()
        return Attempt(counts, next(self._numbers), self._clock)

    def as_json(self, term: int, leases: dict[str, bool], problem: str | None) -> dict[str, Any]:
        """GET /observations."""
        now = self._clock()
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
            "split_problem": problem,
            "bounds_seconds": list(BOUNDS_SECONDS),
            "models": models,
        }


class _Collected(Collector):
    """The families of one scrape."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self._tree = tree

    def collect(self) -> Iterator[Any]:
        by_version = ["model", "version"]
        requests = CounterMetricFamily(
            "mansard_requests", "Requests that ended, per version asked", labels=[*by_version, "outcome"]
        )
        rescues = CounterMetricFamily("mansard_rescues", "Errors after which stable was asked", labels=by_version)
        in_flight = GaugeMetricFamily("mansard_in_flight", "Requests not yet ended", labels=by_version)
        oldest = GaugeMetricFamily("mansard_oldest_waiting_seconds", "Longest wait for a first byte", labels=by_version)
        failures = GaugeMetricFamily("mansard_consecutive_failures", "Errors since the last success", labels=by_version)
        ttft = HistogramMetricFamily("mansard_ttft_seconds", "Time to first token of streams", labels=by_version)
        latency = HistogramMetricFamily("mansard_latency_seconds", "Whole successful requests", labels=by_version)
        lease = GaugeMetricFamily("mansard_canary_lease", "1 while the canary may serve", labels=["model"])
        for model, known in self._tree["models"].items():
            lease.add_metric([model], 1 if known["has_lease"] else 0)
            for version, seen in known["versions"].items():
                labels = [model, version]
                for outcome in OUTCOMES:
                    requests.add_metric([*labels, outcome], seen["errors" if outcome == "error" else outcome])
                rescues.add_metric(labels, seen["rescues"])
                in_flight.add_metric(labels, seen["in_flight"])
                oldest.add_metric(labels, seen["oldest_waiting_seconds"])
                failures.add_metric(labels, seen["consecutive_failures"])
                for family, name in ((ttft, "ttft"), (latency, "latency")):
                    family.add_metric(labels, _buckets(seen[name]["counts"]), seen[name]["total_seconds"])
        refused = CounterMetricFamily("mansard_router_refused", "The router's own refusals", labels=["status"])
        for status, count in self._tree["refused"].items():
            refused.add_metric([status], count)
        term = GaugeMetricFamily("mansard_split_term", "Term of the traffic split in force")
        term.add_metric([], self._tree["term"])
        yield from (requests, rescues, in_flight, oldest, failures, ttft, latency, lease, refused, term)


def _buckets(counts: list[int]) -> list[tuple[str, float]]:
    bounds = [*(str(bound) for bound in BOUNDS_SECONDS), "+Inf"]
    return [(bound, float(total)) for bound, total in zip(bounds, itertools.accumulate(counts), strict=True)]


def prometheus_text(tree: dict[str, Any]) -> bytes:
    """GET /metrics: the text of what `Observations.as_json` returned."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(tree))
    return generate_latest(registry)
