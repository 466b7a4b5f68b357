"""GET /metrics: what all router workers of a site saw, as Prometheus text.

Each series carries its worker's index, so that a restarted worker looks like a restarted counter, which rate() knows;
sum without (worker) is the whole site. One scrape of any worker tells of all. Not covered: the engines' own metrics.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from mansard.serving.router.metrics import BOUNDS_SECONDS, OUTCOMES

_HISTOGRAMS = {
    "ttft": ("mansard_ttft_seconds", "Time to first token of streams"),
    "token": ("mansard_token_seconds", "Mean time per output token of a stream, after its first"),
    "latency": ("mansard_latency_seconds", "Whole successful requests"),
}
_COUNTERS = {
    "rescues": ("mansard_rescues", "Errors after which stable was asked"),
    "output_tokens": ("mansard_output_tokens", "Tokens of successful answers"),
}
_GAUGES = {
    "in_flight": ("mansard_in_flight", "Requests not yet ended"),
    "oldest_waiting_seconds": ("mansard_oldest_waiting_seconds", "Longest wait for a first byte"),
    "consecutive_failures": ("mansard_consecutive_failures", "Errors since the last success"),
}
_BY_VERSION = ("worker", "model", "version")


class _Collected(Collector):
    """The families of one scrape."""

    def __init__(self, trees: Mapping[str, Mapping[str, Any]]) -> None:
        self._trees = trees

    def collect(self) -> Iterator[Any]:
        yield from self._of_versions()
        lease = GaugeMetricFamily("mansard_canary_lease", "1 while the canary may serve", labels=["worker", "model"])
        refused = CounterMetricFamily("mansard_router_refused", "The router's own 4xx", labels=["worker", "status"])
        left = CounterMetricFamily(
            "mansard_clients_left", "Requests whose client went away before the answer's end", labels=["worker"]
        )
        term = GaugeMetricFamily("mansard_split_term", "Term of the traffic split in force", labels=["worker"])
        problem = GaugeMetricFamily(
            "mansard_split_problem_seconds", "How long the newest split has not been taken", labels=["worker"]
        )
        for worker, tree in self._trees.items():
            term.add_metric([worker], tree["term"])
            problem.add_metric([worker], tree["split_problem_seconds"])
            left.add_metric([worker], tree["clients_left"])
            for status, count in tree["refused"].items():
                refused.add_metric([worker, status], count)
            for model, known in tree["models"].items():
                lease.add_metric([worker, model], 1 if known["has_lease"] else 0)
        yield from (lease, refused, left, term, problem)

    def _of_versions(self) -> Iterator[Any]:
        requests = CounterMetricFamily(
            "mansard_requests", "Requests that ended, per version asked", labels=[*_BY_VERSION, "outcome"]
        )
        counters = {k: CounterMetricFamily(*words, labels=_BY_VERSION) for k, words in _COUNTERS.items()}
        gauges = {k: GaugeMetricFamily(*words, labels=_BY_VERSION) for k, words in _GAUGES.items()}
        histograms = {k: HistogramMetricFamily(*words, labels=_BY_VERSION) for k, words in _HISTOGRAMS.items()}
        for labels, seen in self._versions():
            for outcome in OUTCOMES:
                requests.add_metric([*labels, outcome], seen["errors" if outcome == "error" else outcome])
            for key, counter in counters.items():
                counter.add_metric(labels, seen[key])
            for key, gauge in gauges.items():
                gauge.add_metric(labels, seen[key])
            for key, histogram in histograms.items():
                histogram.add_metric(labels, _buckets(seen[key]["counts"]), seen[key]["total_seconds"])
        yield from (requests, *counters.values(), *gauges.values(), *histograms.values())

    def _versions(self) -> Iterator[tuple[list[str], Mapping[str, Any]]]:
        for worker, tree in self._trees.items():
            for model, known in tree["models"].items():
                for version, seen in known["versions"].items():
                    yield [worker, model, version], seen


def _buckets(counts: list[int]) -> list[tuple[str, float]]:
    bounds = [*(str(bound) for bound in BOUNDS_SECONDS), "+Inf"]
    return [(bound, float(total)) for bound, total in zip(bounds, itertools.accumulate(counts), strict=True)]


def prometheus_text(trees: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The text of what each worker's `Observations.as_json` returned, by worker."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(trees))
    return generate_latest(registry)
