"""The rollout controller: walks an approved version through its canary steps, then promotes or aborts it.

Guarantees: a move is journaled (compare-and-swap) before the split shows it, with no await in between; the lease is
renewed every second while a canary has traffic; whatever ends the walk (a person, a dead engine, an error in here)
takes the canary to 0 %. The decisions are the pure `advance` of release/rollout.py. Does not cover: resuming a walk
after the host died (it is aborted then), statistics beyond error rates.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from mansard.errors import BadInput, Conflict, MansardError
from mansard.records import Registration
from mansard.release.analysis import Counts
from mansard.release.events import ABORTED, PROMOTED, Pointers
from mansard.release.journal import Journal
from mansard.release.pointer import last_move
from mansard.release.rollout import Observation, Plan, State, aborted, advance
from mansard.serving import engine_http
from mansard.serving.engine import Engine
from mansard.serving.host_observations import Reports, consecutive_failures_since, counts_since, read_reports
from mansard.serving.host_residents import Residents
from mansard.serving.host_traffic import Traffic
from mansard.site import Site

TICK_SECONDS = 0.5
LEASE_SECONDS = 1.0
"""Router workers take the canary to 0 % when the lease has stood still for 10 s."""
PROBE_SECONDS = 5.0
PROBE_TIMEOUT_SECONDS = 60.0
WORKERS_SECONDS = 30.0
"""A worker that did not take a step by then ends the rollout; until it takes it, it sends the canary nothing more."""
HOST = "host"
"""Who the journal names for what the controller decided itself."""

log = logging.getLogger(__name__)

CheckApproval = Callable[[str, int], None]
"""Raises NotAllowed or Conflict unless (model, version) may be released now."""
CheckEvidence = Callable[[Registration], None]
"""Raises Corrupt unless artifact and verdict record are whole. It reads every byte, so it runs in a thread."""
FindFingerprintChange = Callable[[str, int, Engine], Awaitable[str]]
"""How the fingerprint of (model, version) differs from the recorded one; empty when it does not."""


class Walk:
    """One rollout while it runs and after it ended."""

    def __init__(self, registration: Registration, version: int, who: str, pointers: Pointers, plan: Plan) -> None:
        self.registration = registration
        self.model = registration.model_name
        self.version = version
        self.who = who
        self.pointers = pointers  # as the journal has them after our own last move
        self.state = State(plan)
        self.engine: Engine | None = None
        self.is_ready = False
        self.problem = ""
        self.step_began = 0.0
        self.before_step: Reports = {}
        self.before_walk: Reports = {}
        self.observation = Observation()
        self.task: asyncio.Task[None] | None = None

    def describe(self) -> dict[str, Any]:
        state, seen = self.state, self.observation
        return {
            "state": state.phase,
            "version": self.version,
            "who": self.who,
            "step": state.step + 1 if state.phase != "starting" and state.plan.steps else 0,
            "steps": len(state.plan.steps),
            "weight_percent": state.weight_percent,
            "reason": state.reason,
            "observations": {
                "seconds_in_step": round(seen.seconds_in_step, 1),
                "canary": asdict(seen.canary),
                "stable": asdict(seen.stable),
                "consecutive_failures": seen.consecutive_failures,
            },
        }


class Rollouts:
    """The walks of all models; one at a time per model (the journal sees to that)."""

    def __init__(
        self,
        site: Site,
        journal: Journal,
        traffic: Traffic,
        residents: Residents,
        check_approval: CheckApproval,
        check_evidence: CheckEvidence,
        find_fingerprint_change: FindFingerprintChange,
        session: Any,  # noqa: ANN401 - passed on to engine_http
    ) -> None:
        self._site = site
        self._journal = journal
        self._traffic = traffic
        self._residents = residents
        self._check_approval = check_approval
        self._check_evidence = check_evidence
        self._find_fingerprint_change = find_fingerprint_change
        self._session = session
        self._walks: dict[str, Walk] = {}

    def describe(self, model: str) -> dict[str, Any]:
        """The running or last walk; after a restart of the host, what the journal says of the last one."""
        walk = self._walks.get(model)
        if walk is not None:
            return walk.describe()
        last = last_move(self._journal.moves(model), model)
        states = {PROMOTED: "promoted", ABORTED: "aborted"}
        answer = {"state": "idle", "version": None, "reason": "", "weight_percent": 0}
        if last is not None and last.kind in states:
            weight = 100 if last.kind == PROMOTED else 0
            answer = {"state": states[last.kind], "version": last.version, "reason": last.why, "weight_percent": weight}
        return {**answer, "step": 0, "steps": 0, "observations": {}}

    async def start(self, model: str, version: int, who: str, why: str) -> Walk:
        """Check evidence and approval, claim the model in the journal, go on in the background.

        Raises NotAllowed, Conflict (another rollout runs, baseline moved), Corrupt or BadInput; then nothing has moved.
        """
        self._check_free(model, version)
        registration = self._journal.registration(model, version)
        await asyncio.to_thread(self._check_evidence, registration)
        expected = self._check_free(model, version)
        self._check_approval(model, version)
        try:
            plan = Plan.from_release(registration.release, has_stable=expected.stable is not None)
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"{model} version {version}: its release section has no canary steps: {error!r}") from error
        self._journal.start_rollout(model, version, who, why, expected)
        walk = Walk(registration, version, who, self._journal.pointers(model), plan)
        self._walks[model] = walk
        walk.task = asyncio.create_task(self._run(walk), name=f"rollout {model} {version}")
        return walk

    def _check_free(self, model: str, version: int) -> Pointers:
        pointers = self._journal.pointers(model)
        if pointers.canary is not None:
            raise Conflict(f"{model}: a rollout of version {pointers.canary} runs; wait for it or: mansard rollback")
        if pointers.stable == version:
            raise Conflict(f"{model}: version {version} is stable already; nothing to release")
        return pointers

    def abort(self, model: str, who: str, reason: str, expected: Pointers) -> int:
        """Journal the abort, take the canary to 0 %, end the walk. Returns the term. Conflict when the world moved."""
        assert expected.canary is not None, "abort without a rollout"
        walk = self._walks.get(model)
        facts = walk.describe() if walk is not None else {}
        term = self._journal.abort(model, expected.canary, who, reason, expected, facts)
        if walk is not None and walk.version == expected.canary:
            walk.state = aborted(walk.state, reason)
        self._traffic.remove_canary(model, term)
        self._residents.wake()
        log.info("%s version %s: aborted by %s: %s", model, expected.canary, who, reason)
        return term

    def abort_all(self, reason: str) -> None:
        """Every rollout that the journal has open, also those of a host before this one."""
        for model in self._site.models:
            pointers = self._journal.pointers(model)
            if pointers.canary is not None:
                self.abort(model, HOST, reason, pointers)

    def engine_ended(self, engine: Engine) -> None:
        """The engine of a canary died: the next tick aborts."""
        for walk in self._walks.values():
            if walk.engine is engine:
                walk.problem = f"its engine died: {engine.problem}"

    async def close(self) -> None:
        """End the walks; call `abort_all` first."""
        tasks = [w.task for w in self._walks.values() if w.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, walk: Walk) -> None:
        helpers = [asyncio.create_task(self._prepare(walk))]
        try:
            while not walk.state.is_over:
                await self._tick(walk)
                if walk.state.phase == "canary" and len(helpers) == 1:
                    helpers.append(asyncio.create_task(self._hold_lease(walk)))
                    helpers.append(asyncio.create_task(self._probe(walk)))
        except (MansardError, OSError) as error:  # a race lost to another process, or a full disk
            self._end_after_error(walk, str(error))
        finally:
            for helper in helpers:
                helper.cancel()
            if not walk.state.is_over:
                self._end_after_error(walk, "the controller ended")

    async def _tick(self, walk: Walk) -> None:
        await asyncio.sleep(TICK_SECONDS)
        reports = await read_reports(self._site)
        walk.observation = self._observe(walk, reports)
        following = advance(walk.state, walk.observation)
        if following == walk.state:
            return
        if following.phase == "aborted":
            self.abort(walk.model, HOST, following.reason, walk.pointers)
        elif following.phase == "promoted":
            self._promote(walk, following)
        else:
            await self._take_step(walk, following)

    def _observe(self, walk: Walk, reports: Reports) -> Observation:
        """Counts of the step; at 100 % stable has none, then its counts of the whole walk stand in for it."""
        model, stable = walk.model, walk.pointers.stable
        seconds = time.monotonic() - walk.step_began if walk.state.phase == "canary" else 0.0
        if walk.state.phase != "canary" or stable is None:
            return Observation(is_ready=walk.is_ready, problem=walk.problem)
        beside = counts_since(walk.before_step, reports, model, stable)
        if walk.state.weight_percent == 100 or beside == Counts():
            beside = counts_since(walk.before_walk, reports, model, stable)
        return Observation(
            seconds_in_step=seconds,
            canary=counts_since(walk.before_step, reports, model, walk.version),
            stable=beside,
            consecutive_failures=consecutive_failures_since(walk.before_walk, reports, model, walk.version),
            is_ready=walk.is_ready,
            problem=walk.problem,
        )

    async def _take_step(self, walk: Walk, following: State) -> None:
        """Journal, then split, then see that every worker took it; the step's clock and counters begin after that."""
        assert walk.engine is not None, "a canary has an engine"
        reports = await read_reports(self._site)
        if walk.state.is_over or walk.problem or any(report.term is None for report in reports.values()):
            return  # a worker that did not tell its counts now would make them look like the step's; next tick again
        facts = walk.describe()
        term = self._journal.step(
            walk.model, walk.version, following.weight_percent, HOST, following.reason, walk.pointers, facts
        )
        if walk.state.phase == "starting":
            walk.before_walk = reports
        walk.pointers = self._journal.pointers(walk.model)
        walk.state = following
        walk.before_step, walk.step_began = reports, time.monotonic()
        weight = following.weight_percent
        self._traffic.set_canary(walk.model, walk.version, walk.engine.endpoint, weight, term)
        log.info("%s version %d: %s", walk.model, walk.version, following.reason)
        behind = await self._traffic.unconfirmed_workers(term, WORKERS_SECONDS)
        if behind:
            walk.problem = f"{', '.join(behind)} did not take term {term} with {weight} % for the canary"

    def _promote(self, walk: Walk, following: State) -> None:
        assert walk.engine is not None, "a canary has an engine"
        model, version = walk.model, walk.version
        term = self._journal.promote(model, version, HOST, following.reason, walk.pointers, walk.describe())
        walk.state = following
        walk.pointers = self._journal.pointers(model)
        self._traffic.set_stable(model, version, walk.engine.endpoint, term)
        self._residents.wake()
        log.info("%s version %d: promoted: %s", model, version, following.reason)

    async def _prepare(self, walk: Walk) -> None:
        """Engine, one real request, fingerprint. What goes wrong becomes the walk's problem."""
        try:
            identity = self._residents.identity(walk.model, walk.version)
            engine = await self._residents.engines.ensure(identity)
            walk.engine = engine
            await engine_http.complete_one_token(self._session, engine.endpoint, walk.model, PROBE_TIMEOUT_SECONDS)
            change = await self._find_fingerprint_change(walk.model, walk.version, engine)
        except (MansardError, OSError) as error:
            walk.problem = str(error)
            return
        if change:
            walk.problem = f"its fingerprint is not the one that evaluation recorded: {change}"
        elif engine.state != "ready":
            walk.problem = f"its engine died: {engine.problem}"
        else:
            walk.is_ready = True

    async def _hold_lease(self, walk: Walk) -> None:
        while walk.state.phase == "canary":
            await asyncio.sleep(LEASE_SECONDS)
            if walk.state.phase == "canary":
                try:
                    self._traffic.renew_lease(walk.model)
                except MansardError as error:  # somebody else wrote a later term, or the disk is full
                    walk.problem = walk.problem or f"the lease could not be renewed: {error}"

    async def _probe(self, walk: Walk) -> None:
        """One small request to the canary's engine every few seconds, beside the users' own."""
        while walk.state.phase == "canary":
            await asyncio.sleep(PROBE_SECONDS)
            assert walk.engine is not None, "a canary has an engine"
            try:
                await engine_http.complete_one_token(
                    self._session, walk.engine.endpoint, walk.model, PROBE_TIMEOUT_SECONDS
                )
            except MansardError as error:
                walk.problem = walk.problem or f"a probe failed: {error}"

    def _end_after_error(self, walk: Walk, reason: str) -> None:
        """The journal decides what is true: abort what it still has open, then show that in the split."""
        pointers = self._journal.pointers(walk.model)
        if pointers.canary == walk.version:
            self.abort(walk.model, HOST, reason, pointers)
        walk.state = aborted(walk.state, reason)
        endpoint = None if pointers.stable is None else self._residents.endpoint(walk.model, pointers.stable)
        self._traffic.follow_pointers(
            walk.model, self._journal.pointers(walk.model), endpoint, self._journal.term()
        )
