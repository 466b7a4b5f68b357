"""What one rollout has seen: counts and sticky keys since its step began, and what the keys had before it (past.py).

Guarantees: what the keys had before the rollout outlives the host (a file below run/), so a resumed step compares with
the same past, and no record counts twice; without the file it compares with what the workers still know. Does not
cover: decisions.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mansard.canonical import canonical_json, sha256_json, write_atomically
from mansard.release.analysis import Sample
from mansard.release.events import uptime_now
from mansard.serving.host.observations import (
    Reports,
    consecutive_failures_since,
    counts_since,
    read_reports,
    waiting_now,
)
from mansard.serving.host.past import Interval, Past, add_tables
from mansard.serving.host.sticky_keys import (
    Record,
    RecordTail,
    Table,
    add_records,
    checked_table,
    make_sample,
    with_in_flight,
)
from mansard.site import Site


@dataclass(slots=True)
class Windows:
    """Of one rollout of `version`, beside `stable`; `started` is the sequence of its first journal entry.

    `past` is stable's before the rollout and `beside` since then (until the first step: all that workers remember);
    `canary` and `control` are the step's. `outages` tells when stable's engine was down.
    """

    site: Site
    model: str
    version: int
    stable: int
    started: int
    outages: Callable[[], Sequence[Interval]]
    step_began: float = 0.0
    at_start: Reports = field(default_factory=dict)
    at_step: Reports = field(default_factory=dict)
    past: Table | None = None
    beside: Past = field(default_factory=Past)
    canary: Table = field(default_factory=dict)
    control: Table = field(default_factory=dict)
    newest: float = 0.0
    tail: RecordTail = field(init=False)
    _restored: tuple[Table | None, float] | None = None  # past of the host before, and when its newest record ended

    def __post_init__(self) -> None:
        self.tail = RecordTail(self.site, self.model)

    async def read(self) -> tuple[Reports, bool]:
        """Counts now, and whether every worker that runs told its counts and records. New records join the windows."""
        records, is_heard = await self.tail.read()
        reports = await read_reports(self.site)
        self.take(records)
        return reports, is_heard and not any(report.term is None for report in reports.values())

    def begin_step(self, reports: Reports) -> None:
        """Count anew. The first step settles what was before the rollout."""
        if self.past is None:
            self.at_start = reports
            self.past = self._past_of_host_before()[0]
            if self.past is None:
                self.past, self.beside = self.beside.table(self.outages()), Past(shares=self.beside.shares)
                self._write_past()
        self.at_step = reports
        self.canary, self.control = {}, {}
        self.step_began = time.monotonic()

    def take(self, records: list[Record]) -> None:
        """New records of all versions join the windows."""
        until = self._past_of_host_before()[1]
        new = [r for r in records if r.version == self.stable and r.ended > until]
        self.beside.add(new)
        self.newest = max([self.newest, *(r.ended for r in new)])
        if self.past is not None:
            self.beside.fold(time.monotonic(), self.outages())
            since = [r for r in records if r.ended >= self.step_began]
            add_records(self.control, (r for r in since if r.version == self.stable))
            add_records(self.canary, (r for r in since if r.version == self.version))

    def counts(self, reports: Reports) -> tuple[dict[str, Any], int]:
        """The counts of both sides since the step began, and the canary's present run of failures."""
        counts = {
            name: counts_since(self.at_step, reports, self.model, version)
            for name, version in (("canary", self.version), ("stable", self.stable))
        }
        return counts, consecutive_failures_since(self.at_start, reports, self.model, self.version)

    def waiting(self, reports: Reports) -> dict[str, int]:
        """How many requests wait for their first byte at both sides now."""
        sides = (("canary", self.version), ("stable", self.stable))
        return {side: waiting_now(reports, self.model, version) for side, version in sides}

    def sample(self, weight_percent: int) -> Sample:
        """The keys' sample of the step so far."""
        canary = with_in_flight(self.canary, self.tail.in_flight, self.version)
        if weight_percent == 100:
            past = add_tables(self.past or {}, self.beside.table(self.outages()))
            return make_sample(canary, {}, past, weight_percent)
        control = with_in_flight(self.control, self.tail.in_flight, self.stable)
        return make_sample(canary, control, self.past or {}, weight_percent)

    def _file(self) -> Path:
        return self.site.run / "rollouts" / f"{sha256_json(self.model)[:16]}.json"

    def _past_of_host_before(self) -> tuple[Table | None, float]:
        """What this very rollout wrote before the host was restarted, read once, and the end of its newest record."""
        if self._restored is None:
            try:
                tree = json.loads(self._file().read_text())
                is_same = tree["started"] == self.started
                is_same_clock = is_same and tree["boot"] == uptime_now().boot
                past = checked_table(tree["past"]) if is_same else None
                self._restored = past, float(tree["until"]) if is_same_clock else 0.0
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                self._restored = None, 0.0
        return self._restored

    def _write_past(self) -> None:
        self._file().parent.mkdir(parents=True, exist_ok=True)
        clock = {"until": self.newest, "boot": uptime_now().boot}
        tree = {"format": 1, "model": self.model, "started": self.started, "past": self.past, **clock}
        write_atomically(self._file(), canonical_json(tree))

