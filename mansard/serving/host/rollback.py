"""Rollback by the rules of decision 10: pointer and split first, everything else after.

Guarantees: while a rollout runs, it is aborted and stable stays; a second operator's plain rollback changes nothing; a
cold target is started first while stable goes on serving, and its fingerprint compared (a change warns and does not
stop), unless `hard`. A journal on another machine is waited for PATIENCE_SECONDS; JournalDown then sends the command to
move without the host. `hard` also ends what the version that is left still answers: streams get an error event, other
requests are asked of stable. `milliseconds` is from the decision to the split on disk. Does not cover: the host being
down (the command moves journal and split itself).
"""

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any

from mansard.errors import Conflict, MansardError
from mansard.release import emergency
from mansard.release.direct_rollback import ATTEMPTS, operator_warnings
from mansard.release.events import Pointers, uptime_now, utc_now
from mansard.release.journal import Journal
from mansard.release.pointer import RollbackPlan, plan_rollback
from mansard.release.target_check import later_warnings, target_warnings
from mansard.serving.engine import http as engine_http
from mansard.serving.host.journal_calls import JournalCalls
from mansard.serving.host.journal_view import JournalView
from mansard.serving.host.residents import Residents
from mansard.serving.host.rollouts import Rollouts
from mansard.serving.host.traffic import Traffic
from mansard.serving.worker_splits import CONFIRM_SECONDS
from mansard.site import Site

PATIENCE_SECONDS = 0.3
"""With direct_rollback.JOURNAL_SECONDS after it, users are moved within a second."""
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
        journal: JournalCalls,
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
        num_conflicts = 0
        while True:
            begun = time.perf_counter()
            pointers, plan = await self._plan(request)
            if plan.action == "move":
                await self._residents.locate(request.model, _target(plan))
                is_cold = self._residents.endpoint(request.model, _target(plan)) is None
                if is_cold and not request.hard:
                    if started_seconds:
                        raise MansardError(f"{request.model} version {plan.to}: its engine died right after its start")
                    started_seconds = await self._start(request.model, _target(plan))
                    continue
            try:
                warnings, artifact = await self._target(request, plan)
                term = await self._move(request, plan, pointers)
                break
            except Conflict:  # somebody else moved meanwhile: decide anew
                num_conflicts += 1
                if num_conflicts == ATTEMPTS:
                    raise
            except OSError as error:  # a full disk, no free descriptor
                view = self._residents.views[request.model]
                if view.pointers == pointers:
                    raise
                term = view.term
                warnings.append(f"{self._site.split_file}: not written yet ({error}); the host tries again and again")
                break
        milliseconds = round((time.perf_counter() - begun) * 1000, 3)
        after = self._residents.views[request.model].pointers
        if plan.action != "nothing":
            log.info("%s by %s in %.1f ms", plan.message, request.who, milliseconds)
            if request.hard:
                await self._end_left(request.model, plan)
            warnings += operator_warnings(self._site, request.who)
            warnings += await self._confirm(request, after, term)
            self._residents.wake()
        if artifact is not None:
            warnings += await asyncio.to_thread(later_warnings, self._site, _target(plan), artifact)
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

    async def _plan(self, request: RollbackRequest) -> tuple[Pointers, RollbackPlan]:
        model = request.model

        def read(journal: Journal) -> JournalView:
            emergency.import_waiting(self._site, journal)
            return self._residents.view(journal, model)

        view = self._residents.views[model] = await self._journal.call(read, PATIENCE_SECONDS)
        versions = (request.from_version, request.to_version)
        return view.pointers, plan_rollback(view.moves, model, view.pointers, utc_now(), *versions, uptime_now())

    async def _target(self, request: RollbackRequest, plan: RollbackPlan) -> tuple[list[str], str | None]:
        """Warnings of the version moved to, and its artifact; nothing where none is."""
        if plan.action != "move":
            return [], None
        model, to = request.model, _target(plan)

        def look(journal: Journal) -> tuple[list[str], str]:
            warnings = target_warnings(self._site, journal, model, to, request.hard)
            return warnings, journal.registration(model, to).artifact

        warnings, artifact = await self._journal.call(look)
        return warnings + self._residents.warnings(model, to), artifact

    async def _move(self, request: RollbackRequest, plan: RollbackPlan, pointers: Pointers) -> int:
        """Journal, then split; nothing comes between."""
        if plan.action == "nothing":
            return self._residents.views[request.model].term
        if plan.action == "abort":
            why = request.why or plan.message
            return await self._rollouts.abort(request.model, request.who, why, pointers, PATIENCE_SECONDS)
        to, why = _target(plan), request.why or plan.message
        model, facts = request.model, {"hard": request.hard}

        def move(journal: Journal) -> tuple[int, JournalView]:
            term = journal.rollback(model, to, request.who, why, pointers, facts)
            return term, self._residents.view(journal, model)

        term, self._residents.views[model] = await self._journal.call(move, PATIENCE_SECONDS)
        self._traffic.set_stable(model, to, self._residents.endpoint(model, to), term)
        return term

    async def _start(self, model: str, version: int) -> float:
        log.info("%s version %d does not answer: it is started before traffic moves", model, version)
        begun = time.monotonic()
        await self._residents.start(model, version)
        return time.monotonic() - begun

    async def _end_left(self, model: str, plan: RollbackPlan) -> None:
        """The engine of the version that is left, unless it serves others too."""
        assert plan.version is not None, f"a {plan.action} names the version that is left"
        await self._residents.locate(model, plan.version)
        if not self._residents.shares_engine(model, plan.version):
            await self._residents.engines.end_now(self._residents.place(model, plan.version).engine)

    async def _confirm(self, request: RollbackRequest, after: Pointers, term: int) -> list[str]:
        """What is not as it should be after the move: a worker that did not take it, a stable that does not answer."""
        warnings = await self._traffic.unconfirmed_workers(term, CONFIRM_SECONDS)
        stable = after.stable
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
