"""What one rollout has seen: counts and sticky keys since its step began, and what the keys had before it (past.py).

Guarantees: what the keys had before the rollout, and the secret that decides on their sides, outlive the host (a file
of mode 600 below run/), so a resumed step compares the same users with the same past and counts no record twice;
without the file it compares with what the workers still know, and users change sides. Does not cover: decisions.
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
from mansard.release.tenants import tenants_of
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
    tenant_numbers,
    with_in_flight,
)
from mansard.serving.split import new_salt
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
    salt: str = field(default_factory=new_salt, repr=False)
    step_began: float = 0.0
    at_start: Reports = field(default_factory=dict)
    at_step: Reports = field(default_factory=dict)
    past: Table | None = None
    beside: Past = field(default_factory=Past)
    canary: Table = field(default_factory=dict)
    control: Table = field(default_factory=dict)
    newest: float = 0.0
    tail: RecordTail = field(init=False)
    _restored: tuple[Table | None, float, str] | None = None

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
            self.past, _, salt = self._of_host_before()
            self.salt = salt or self.salt
            if self.past is None:
                self.past, self.beside = self.beside.table(self.outages()), Past(shares=self.beside.shares)
                self._write_past()
        self.at_step = reports
        self.canary, self.control = {}, {}
        self.step_began = time.monotonic()

    def take(self, records: list[Record]) -> None:
        """New records of all versions join the windows."""
        until = self._of_host_before()[1]
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
        return counts, consecutive_failures_since(
            self.at_start, reports, self.model, self.version, self._num_tenants()
        )

    def waiting(self, reports: Reports) -> dict[str, int]:
        """How many requests wait for their first byte at both sides now."""
        sides = (("canary", self.version), ("stable", self.stable))
        return {side: waiting_now(reports, self.model, version) for side, version in sides}

    def sample(self, weight_percent: int) -> Sample:
        """The keys' sample of the step so far."""
        canary = with_in_flight(self.canary, self.tail.in_flight, self.version)
        if weight_percent == 100:
            past = add_tables(self.past or {}, self.beside.table(self.outages()))
            return make_sample(canary, {}, past, weight_percent, self.salt)
        control = with_in_flight(self.control, self.tail.in_flight, self.stable)
        return make_sample(canary, control, self.past or {}, weight_percent, self.salt)

    def _num_tenants(self) -> int:
        """Who asked before the rollout and in this step; one where the others are next to nobody."""
        users = {user for table in (self.past or {}, self.control, self.canary) for user in table}
        tenants = tenants_of(tenant_numbers(users), len(users))
        return tenants.number if tenants.sole is None else 1

    def _file(self) -> Path:
        return self.site.run / "rollouts" / f"{sha256_json(self.model)[:16]}.json"

    def _of_host_before(self) -> tuple[Table | None, float, str]:
        """What this very rollout wrote before the host was restarted, read once: the past, the end of its newest
        record, and the salt."""
        if self._restored is None:
            try:
                tree = json.loads(self._file().read_text())
                is_same = tree["started"] == self.started
                is_same_clock = is_same and tree["boot"] == uptime_now().boot
                past = checked_table(tree["past"]) if is_same else None
                until = float(tree["until"]) if is_same_clock else 0.0
                self._restored = past, until, str(tree["salt"]) if is_same else ""
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                self._restored = None, 0.0, ""
        return self._restored

    def _write_past(self) -> None:
        self._file().parent.mkdir(parents=True, exist_ok=True)
        clock = {"until": self.newest, "boot": uptime_now().boot}
        tree = {"format": 1, "model": self.model, "started": self.started, "past": self.past, "salt": self.salt}
        write_atomically(self._file(), canonical_json({**tree, **clock}), 0o600)

