"""What the router workers saw: counters over their admin sockets, as differences since a step began.

Guarantees: a worker that restarted counts from zero, never negative; failures from before the step are not held against
the canary. A rescue is already one of the errors of the version that failed (the router counts it so).
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mansard.errors import MansardError
from mansard.release.rollout import counted_run
from mansard.serving.client import HostClient, HostDown, router_sockets
from mansard.site import Site

WORKER_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Counts:
    """What the router workers saw of one version: requests that ended as a success or an error, and those that failed.

    A rescue (the router asked stable after the canary failed, before the first byte) is an error of the version that
    failed.
    """

    requests: int = 0
    errors: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.requests + other.requests, self.errors + other.errors)


@dataclass(frozen=True, slots=True)
class Seen:
    """One worker's counters of one version; `requests` are those that ended as a success or an error, `waiting` those
    that have no first byte yet, `failures_of_tenants` is each tenant's part of the present run of failures."""

    requests: int = 0
    errors: int = 0
    failures_of_tenants: tuple[int, ...] = ()
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """One worker's answer. `term` is None when it is there but did not answer in time."""

    term: int | None
    models: Mapping[str, Mapping[int, Seen]]

    def seen(self, model: str, version: int) -> Seen:
        return self.models.get(model, {}).get(version, Seen())


Reports = Mapping[str, WorkerReport]
"""By the worker's socket name. Workers that do not run are left out."""


async def read_reports(site: Site) -> Reports:
    """Ask every router worker."""
    paths = router_sockets(site)
    answers = await asyncio.gather(*(asyncio.to_thread(_ask, path) for path in paths))
    return {path.name: report for path, report in zip(paths, answers, strict=True) if report is not None}


def _ask(path: Path) -> WorkerReport | None:
    try:
        tree = HostClient(path).call("GET", "/observations", timeout_seconds=WORKER_TIMEOUT_SECONDS)
        return parse_report(tree)
    except HostDown:
        return None
    except MansardError:
        return WorkerReport(None, {})


def parse_report(tree: Mapping[str, Any]) -> WorkerReport:
    """A worker's JSON; MansardError when it is another form."""
    try:
        models = {
            name: {int(number): _parse_seen(v) for number, v in model["versions"].items()}
            for name, model in tree["models"].items()
        }
        return WorkerReport(int(tree["term"]), models)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MansardError(f"a router worker's observations are not of format 1: {error!r}") from error


def _parse_seen(tree: Mapping[str, Any]) -> Seen:
    undecided = int(tree.get("engine_4xx", 0)) + int(tree.get("cancelled", 0))
    failures = tuple(int(number) for number in tree["failures_of_tenants"])
    return Seen(int(tree["requests"]) - undecided, int(tree["errors"]), failures, int(tree.get("waiting", 0)))


def waiting_now(now: Reports, model: str, version: int) -> int:
    """Requests of all workers that wait for a version's first byte."""
    return sum(report.seen(model, version).waiting for report in now.values())


def counts_since(before: Reports, now: Reports, model: str, version: int) -> Counts:
    """Requests and errors of a version over all workers since `before`."""
    total = Counts()
    for worker, report in now.items():
        then, new = _baseline(before, worker, report, model, version), report.seen(model, version)
        requests = new.requests - then.requests
        total += Counts(requests, min(max(new.errors - then.errors, 0), requests))
    return total


def consecutive_failures_since(before: Reports, now: Reports, model: str, version: int, num_tenants: int) -> int:
    """The longest present run of failures that one worker sees, of requests since `before`, as it counts where so many
    tenants ask."""
    runs = [0]
    for worker, report in now.items():
        then, new = _baseline(before, worker, report, model, version), report.seen(model, version)
        runs.append(min(counted_run(new.failures_of_tenants, num_tenants), new.requests - then.requests))
    return max(runs)


def _baseline(before: Reports, worker: str, report: WorkerReport, model: str, version: int) -> Seen:
    """Where counting starts: the earlier counters, or zero for a worker that is new or was restarted."""
    then = before[worker].seen(model, version) if worker in before else Seen()
    return Seen() if report.seen(model, version).requests < then.requests else then
