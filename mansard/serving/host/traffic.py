"""The host's side of the traffic split: write it, read it back, see that every router worker took it.

Guarantees: each call is one read-modify-write without an await in it, so calls never overlap inside the host; the file
itself refuses an older term. Does not cover: the journal, which hands out the terms before anything here is called.
"""

import asyncio
import time
from collections.abc import Callable, Mapping

from mansard.errors import Corrupt
from mansard.release.events import Pointers
from mansard.serving import split as splits
from mansard.serving.host.observations import read_reports
from mansard.serving.split import Split, read_split, write_split
from mansard.site import Site

POLL_SECONDS = 0.05


class Traffic:
    """Endpoints are http://127.0.0.1:PORT, or None while no engine holds the version. `name_of` says what a request
    asks a version's engine for."""

    def __init__(self, site: Site, name_of: Callable[[str, int], str]) -> None:
        self._site = site
        self._name_of = name_of

    def split(self) -> Split:
        """What is on disk; the empty split where that is damaged, because the journal is the truth."""
        try:
            return read_split(self._site.split_file)
        except Corrupt:
            return Split()

    def set_stable(self, model: str, version: int, endpoint: str | None, term: int) -> None:
        """All traffic to `version`; no canary."""
        self._write(splits.with_stable(self.split(), model, version, endpoint, self._name_of(model, version), term))

    def set_canary(self, model: str, version: int, endpoint: str, weight_percent: int, term: int, salt: str) -> None:
        name = self._name_of(model, version)
        self._write(splits.with_canary(self.split(), model, version, endpoint, name, weight_percent, term, salt))

    def remove_canary(self, model: str, term: int) -> None:
        """All traffic to stable; a model without a stable has no traffic at all, and nothing to write."""
        split = self.split()
        if model in split.models:
            self._write(splits.without_canary(split, model, term))

    def renew_lease(self, model: str) -> None:
        self._write(splits.renewed(self.split(), model))

    def hold_endpoints(self, model: str, endpoints: Mapping[int, str | None]) -> None:
        """The resident versions and where they are; others leave, unless they are stable or canary."""
        split = self.split()
        known = split.models.get(model)
        if known is None:
            return
        for version, endpoint in endpoints.items():
            if version not in known.versions or known.versions[version].endpoint != endpoint:
                split = splits.with_endpoint(split, model, version, endpoint, self._name_of(model, version))
        for version in known.versions:
            if version not in endpoints and version not in (known.stable, known.canary, known.stands_in_for):
                split = splits.without_version(split, model, version)
        if split.models[model] != known:
            self._write(split)

    def follow_pointers(self, model: str, pointers: Pointers, endpoint: str | None, term: int) -> None:
        """Make the file say what the journal says: stable has everything, or who stands in for it already. For a host
        that starts, or lost a race."""
        if pointers.stable is None:
            return
        split = self.split()
        known = split.models.get(model)
        if known is not None and known.journal_stable == pointers.stable:
            if known.canary is None and split.term == term:
                return
            if known.stands_in_for is not None:
                self._write(splits.renewed(splits.without_canary(split, model, term), model))
                return
        name = self._name_of(model, pointers.stable)
        wanted = splits.with_stable(split, model, pointers.stable, endpoint, name, term)
        self._write(splits.renewed(wanted, model))

    def stand_in(self, model: str, version: int, endpoint: str | None, stable: int) -> bool:
        """`version` serves the users of `stable`, or `stable` its own again; False, and nothing written, where the
        journal's stable is another one by the file: somebody moved it meanwhile."""
        split = self.split()
        model_split = split.models.get(model)
        if model_split is None or model_split.journal_stable != stable:
            return False
        if (model_split.stable, model_split.versions[model_split.stable].endpoint) != (version, endpoint):
            self._write(splits.with_stand_in(split, model, version, endpoint, self._name_of(model, version)))
        return True

    async def unconfirmed_workers(self, term: int, timeout_seconds: float) -> list[str]:
        """Wait until every router worker reports `term` or a later one; the names of those that did not."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            reports = await read_reports(self._site)
            behind = [name for name, report in reports.items() if report.term is None or report.term < term]
            if not behind or time.monotonic() > deadline:
                return behind
            await asyncio.sleep(POLL_SECONDS)

    def _write(self, split: Split) -> None:
        write_split(self._site.split_file, split)
