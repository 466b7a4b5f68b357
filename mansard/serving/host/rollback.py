"""Rollback by the rules of decision 10: pointer and split first, everything else after.

Guarantees: while a rollout runs, it is aborted and stable stays; a second operator's plain rollback changes nothing; a
cold target is started first while stable goes on serving, and its fingerprint compared (a change warns and does not
stop), unless `hard`. `hard` also ends what the version that is left still answers: streams get an error event, other
requests are asked of stable. `milliseconds` is from the decision to the split on disk. Does not cover: the host being
down (the command moves journal and split itself).
"""

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any

from mansard.errors import MansardError
from mansard.release import emergency
from mansard.release.direct_rollback import operator_warnings
from mansard.release.events import Pointers, uptime_now, utc_now
from mansard.release.journal import Journal
from mansard.release.pointer import RollbackPlan, plan_rollback
from mansard.release.target_check import later_warnings, target_warnings
from mansard.serving.engine import http as engine_http
from mansard.serving.host.residents import Residents
from mansard.serving.host.rollouts import Rollouts
from mansard.serving.host.traffic import Traffic
from mansard.serving.worker_splits import CONFIRM_SECONDS
from mansard.site import Site

CONFIRM_TIMEOUT_SECONDS = 30.0
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RollbackRequest:
    """What an operator asked for."""

    model: str
    from_version: int | None
    to_version: int | None
    hard: bool
    who: str
    why: str


class Rollback:
    """Moves back; holds nothing of its own."""

    def __init__(
        self,
        site: Site,
        journal: Journal,
        traffic: Traffic,
        residents: Residents,
        rollouts: Rollouts,
        session: Any,  # noqa: ANN401 - passed on to engine_http
    ) -> None:
        self._site = site
        self._journal = journal
        self._traffic = traffic
        self._residents = residents
        self._rollouts = rollouts
        self._session = session

    async def run(self, request: RollbackRequest) -> dict[str, Any]:
        """Plan and move. Conflict with nothing to go back to, BadInput for a target that was never stable.

        The target's digests are checked (Corrupt, a warning with `hard`; of a bucket's only after the move, for two
        seconds at most, and as a warning); approvals and keys only reported.
        """
        started_seconds = 0.0
        while True:
            begun = time.perf_counter()
            pointers, plan = self._plan(request)
            cold = plan.action == "move" and self._residents.endpoint(request.model, _target(plan)) is None
            if not cold or request.hard:
                break
            if started_seconds:
                raise MansardError(f"{request.model} version {plan.to}: its engine died right after its start")
            started_seconds = await self._start(request.model, _target(plan))
        warnings: list[str] = []
        if plan.action == "move":
            warnings = target_warnings(self._site, self._journal, request.model, _target(plan), request.hard)
            warnings += self._residents.warnings(request.model, _target(plan))
        try:
            term = self._move(request, plan, pointers)
        except OSError as error:  # a full disk, no free descriptor
            if self._journal.pointers(request.model) == pointers:
                raise
            term = self._journal.term()
            warnings.append(f"{self._site.split_file}: not written yet ({error}); the host tries again all the time")
        milliseconds = round((time.perf_counter() - begun) * 1000, 3)
        if plan.action != "nothing":
            log.info("%s by %s in %.1f ms", plan.message, request.who, milliseconds)
            if request.hard:
                await self._end_left(request.model, plan)
            warnings += operator_warnings(self._site, request.who)
            warnings += await self._confirm(request, plan, term)
            self._residents.wake()
        if plan.action == "move":
            artifact = self._journal.registration(request.model, _target(plan)).artifact
            warnings += await asyncio.to_thread(later_warnings, self._site, _target(plan), artifact)
        after = self._journal.pointers(request.model)
        return {
            "changed": plan.action != "nothing",
            "action": plan.action,
            "stable": after.stable,
            "canary": after.canary,
            "previous": after.previous,
            "term": term,
            "message": plan.message,
            "milliseconds": milliseconds,
            "started_seconds": round(started_seconds, 1),
            "warnings": warnings,
        }

    def _plan(self, request: RollbackRequest) -> tuple[Pointers, RollbackPlan]:
        model = request.model
        emergency.import_waiting(self._site, self._journal)
        pointers = self._journal.pointers(model)
        moves = self._journal.moves(model)
        asked = (request.from_version, request.to_version)
        return pointers, plan_rollback(moves, model, pointers, utc_now(), *asked, uptime_now())

    def _move(self, request: RollbackRequest, plan: RollbackPlan, pointers: Pointers) -> int:
        """Journal, then split; no await, so nothing comes between."""
        if plan.action == "nothing":
            return self._journal.term()
        if plan.action == "abort":
            return self._rollouts.abort(request.model, request.who, request.why or plan.message, pointers)
        to, why = _target(plan), request.why or plan.message
        term = self._journal.rollback(request.model, to, request.who, why, pointers, {"hard": request.hard})
        self._traffic.set_stable(request.model, to, self._residents.endpoint(request.model, to), term)
        return term

    async def _start(self, model: str, version: int) -> float:
        log.info("%s version %d does not answer: it is started before traffic moves", model, version)
        begun = time.monotonic()
        await self._residents.start(model, version)
        return time.monotonic() - begun

    async def _end_left(self, model: str, plan: RollbackPlan) -> None:
        """The engine of the version that is left, unless it serves others too."""
        assert plan.version is not None, f"a {plan.action} names the version that is left"
        if not self._residents.shares_engine(model, plan.version):
            await self._residents.engines.end_now(self._residents.place(model, plan.version).engine)

    async def _confirm(self, request: RollbackRequest, plan: RollbackPlan, term: int) -> list[str]:
        """What is not as it should be after the move: a worker that did not take it, a stable that does not answer."""
        warnings = await self._traffic.unconfirmed_workers(term, CONFIRM_SECONDS)
        stable = self._journal.pointers(request.model).stable
        endpoint = None if stable is None else self._residents.endpoint(request.model, stable)
        if stable is None:
            return warnings
        if endpoint is None:
            return [*warnings, f"version {stable} does not answer yet; it is being started"]
        try:
            name = self._residents.name(request.model, stable)
            await engine_http.complete_one_token(self._session, endpoint, name, CONFIRM_TIMEOUT_SECONDS)
        except MansardError as error:
            warnings.append(f"version {stable} did not answer a real request: {error}")
        return warnings


def _target(plan: RollbackPlan) -> int:
    assert plan.to is not None, f"a {plan.action} has no target"
    return plan.to
