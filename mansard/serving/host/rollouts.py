"""The rollouts of this host: started after every check, taken up from the journal after a crash, ended by an abort.

Guarantees: at most one walk per model (the journal sees to that); a rollout that the journal has open is walked on by
the host that starts next, from the beginning of its step and with its engine checked again. Does not cover: the walk
itself (walk.py).
"""

import asyncio
import functools
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

from mansard.errors import BadInput, Conflict, MansardError
from mansard.records import Registration
from mansard.release.events import ABORTED, CANARY_STEP, PROMOTED, ROLLOUT_STARTED, Entry, Pointers
from mansard.release.journal import Journal
from mansard.release.pointer import last_move
from mansard.release.rollout import Plan, State, aborted, resumed
from mansard.serving.engine.engine import Engine
from mansard.serving.host.canary import Canary, FindFingerprintChange
from mansard.serving.host.engine_accounts import EngineAccounts
from mansard.serving.host.fingerprint import ANSWERS_SECONDS
from mansard.serving.host.journal_calls import JournalCalls
from mansard.serving.host.journal_view import JournalView
from mansard.serving.host.outages import Outages
from mansard.serving.host.release_users import ReleaseUsers, read_users
from mansard.serving.host.residents import Residents
from mansard.serving.host.traffic import Traffic
from mansard.serving.host.walk import HOST, Walk, Walker
from mansard.serving.host.windows import Windows
from mansard.serving.split import new_salt
from mansard.site import Site
from mansard.specs.release import Release
from mansard.store.store import Store

log = logging.getLogger(__name__)

CheckApproval = Callable[[Journal, str, int], None]
"""Raises NotAllowed or Conflict unless (model, version) may be released now, by this journal."""
CheckEvidence = Callable[[Registration], None]
"""Raises Corrupt unless artifact and verdict record are whole. It reads every byte, so it runs in a thread."""


class Rollouts:
    """The walks of all models, running or over."""

    def __init__(
        self,
        site: Site,
        journal: JournalCalls,
        store: Store,
        traffic: Traffic,
        residents: Residents,
        outages: Outages,
        check_approval: CheckApproval,
        check_evidence: CheckEvidence,
        find_fingerprint_change: FindFingerprintChange,
        session: Any,  # noqa: ANN401 - passed on to engine_http
    ) -> None:
        self._site = site
        self._journal = journal
        self._store = store
        self._traffic = traffic
        self._residents = residents
        self._outages = outages
        self._check_approval = check_approval
        self._check_evidence = check_evidence
        self._find_fingerprint_change = find_fingerprint_change
        self._session = session
        self._walks: dict[str, Walk] = {}
        self._tasks: dict[str, tuple[Walker, asyncio.Task[None]]] = {}
        self._resuming: dict[str, asyncio.Task[None]] = {}

    async def state(self, model: str) -> dict[str, Any]:
        """The running or last walk; the journal is asked where this host has none."""
        if model in self._walks:
            return self._walks[model].describe()
        return self.describe(model, (await self._residents.read(model)).moves)

    def describe(self, model: str, moves: Sequence[Entry]) -> dict[str, Any]:
        """The running or last walk; after a restart of the host, what the journal's `moves` say of the last one."""
        walk = self._walks.get(model)
        if walk is not None:
            return walk.describe()
        last = last_move(moves, model)
        states = {PROMOTED: "promoted", ABORTED: "aborted"}
        answer = {"state": "idle", "version": None, "reason": "", "weight_percent": 0}
        if last is not None and last.kind in states:
            weight = 100 if last.kind == PROMOTED else 0
            answer = {"state": states[last.kind], "version": last.version, "reason": last.why, "weight_percent": weight}
        return {**answer, "step": 0, "steps": 0, "observations": {}}

    async def start(self, model: str, version: int, who: str, why: str) -> Walk:
        """Check evidence, approval and users, claim the model in the journal, go on in the background.

        Raises NotAllowed, Conflict (another rollout runs, baseline moved, too few users), Corrupt or BadInput; then
        nothing has moved.
        """
        before = await self._check_free(model, version)
        registration = await self._registration(model, version)
        await asyncio.to_thread(self._check_evidence, registration)
        await self._journal.call(lambda journal: self._check_approval(journal, model, version))
        plan, salt, users = await self._plan_and_users(registration, version, before.stable)
        users.check(model, version)
        expected = await self._check_free(model, version)
        if expected.stable != before.stable:
            raise Conflict(f"{model}: stable moved from {before.stable} to {expected.stable} meanwhile; mansard status")
        facts = {"users": users.as_json()}

        def start(journal: Journal) -> tuple[JournalView, int]:
            self._check_approval(journal, model, version)
            journal.start_rollout(model, version, who, why, expected, facts)
            return self._residents.view(journal, model), _started(journal, model, version)

        view, started = await self._journal.call(start)
        return self._begin(State(plan), model, version, who, view, started, salt)

    async def users(self, model: str, version: int) -> ReleaseUsers:
        """Who asked lately, and whom each step of a release of `version` would find."""
        registration = await self._registration(model, version)
        stable = (await self._residents.read(model)).pointers.stable
        return (await self._plan_and_users(registration, version, stable))[2]

    async def _plan_and_users(
        self, registration: Registration, version: int, stable: int | None
    ) -> tuple[Plan, str, ReleaseUsers]:
        # The store may be a bucket. A place that was read once is remembered.
        plan = await asyncio.to_thread(self._plan, registration, version, stable)
        await self._residents.locate(registration.model_name, version)
        return plan, *await read_users(self._site, registration.model_name, plan.steps)

    async def _registration(self, model: str, version: int) -> Registration:
        return await self._journal.call(lambda journal: journal.registration(model, version))

    def resume(self, model: str) -> None:
        """Walk on with what the journal has open, if anything. What speaks against it now aborts it.

        In the background, because its plan is read from the store, which may hang. After a look at the model.
        """
        if self._residents.views[model].pointers.canary is not None:
            self._resuming[model] = asyncio.create_task(self._resume(model), name=f"resume {model}")

    async def _resume(self, model: str) -> None:
        pointers = self._residents.views[model].pointers
        version = pointers.canary
        assert version is not None, "a rollout is open"
        kinds = (ROLLOUT_STARTED, CANARY_STEP)
        entries = await self._journal.call(lambda journal: journal.entries(model, kinds=kinds))
        started = [e for e in entries if e.kind == ROLLOUT_STARTED][-1]
        try:
            await self._journal.call(lambda journal: self._check_approval(journal, model, version))
            registration = await self._registration(model, version)
            plan = await asyncio.to_thread(self._plan, registration, version, pointers.stable)
            await self._residents.locate(model, version)
            view = await self._residents.read(model)
            if view.pointers != pointers:
                return  # a person ended it meanwhile
            state = resumed(plan, [e for e in entries if e.sequence >= started.sequence])
        except (MansardError, ValueError) as error:  # ValueError: a step that the plan does not have any more
            await self.abort(model, HOST, f"the host was started again and cannot walk on: {error}", pointers)
            return
        log.info("%s version %d: taken up again: step %d, attempt %d", model, version, state.step + 1, state.attempt)
        self._begin(state, model, version, started.who, view, started.sequence, new_salt())

    def _begin(
        self, state: State, model: str, version: int, who: str, view: JournalView, started: int, salt: str
    ) -> Walk:
        """Nothing is awaited between the journal's answer and this: an abort finds the walk."""
        self._residents.views[model] = view
        pointers = view.pointers
        answer_seconds = min([ANSWERS_SECONDS, *(step.deadline_seconds for step in state.plan.steps)])
        tools = (self._residents, self._traffic, self._find_fingerprint_change, self._session)
        canary = Canary(model, version, *tools, answer_seconds)
        windows = None
        if pointers.stable is not None:
            outages = functools.partial(self._outages.intervals, model)
            windows = Windows(self._site, model, version, pointers.stable, started, outages, salt)
        engines = EngineAccounts(self._session, functools.partial(self._side_endpoint, canary, pointers.stable))
        walk = Walk(model, version, who, pointers, state, canary, windows, engines)
        walker = Walker(walk, self._journal, self._traffic, self._residents, self._outages, self.abort)
        task = asyncio.create_task(walker.run(), name=f"rollout {model} {version}")
        self._walks[model], self._tasks[model] = walk, (walker, task)
        return walk

    def _side_endpoint(self, canary: Canary, stable: int | None, side: str) -> str | None:
        if side == "canary":
            return None if canary.engine is None else canary.engine.endpoint
        return None if stable is None else self._residents.endpoint(canary.model, stable)

    async def _check_free(self, model: str, version: int) -> Pointers:
        pointers = (await self._residents.read(model)).pointers
        if pointers.canary is not None:
            raise Conflict(f"{model}: a rollout of version {pointers.canary} runs; wait for it or: mansard rollback")
        if pointers.stable == version:
            raise Conflict(f"{model}: version {version} is stable already; nothing to release")
        self._outages.check_free(model)
        return pointers

    def _plan(self, registration: Registration, version: int, stable: int | None) -> Plan:
        ratios = None if stable is None else self._measured_ratios(registration, version)
        try:
            release = Release.model_validate(registration.release, strict=False)  # an older one lacks what has defaults
            return Plan.from_release(release.model_dump(), ratios)
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(
                f"{registration.model_name} version {version}: its release section or measured cost is not of this "
                f"program's form: {error!r}; judge it again: mansard gate {version}"
            ) from error

    def _measured_ratios(self, registration: Registration, version: int) -> dict[str, float]:
        """Candidate over stable, as evaluation measured them side by side: what a person saw and approved.

        Its upper bound, where the measurement tells one: a noisy machine must not make a limit that nothing can keep.
        """
        measured = [snapshot for stage, _, snapshot in registration.stages if stage == "cost"]
        found = json.loads(self._store.read_file(measured[-1], "cost.json")) if measured else {}
        if "ratio" not in found:
            raise BadInput(
                f"{registration.model_name} version {version}: evaluation measured no latency beside stable, so the "
                f"canary's cannot be judged; measure it: mansard gate {version}"
            )
        return {**found["ratio"], **found.get("ratio_high", {})}

    async def abort(
        self, model: str, who: str, reason: str, expected: Pointers, patience_seconds: float | None = None
    ) -> int:
        """Journal the abort, take the canary to 0 %, end the walk. Returns the term. Conflict when the world moved."""
        version = expected.canary
        assert version is not None, "abort without a rollout"
        walk = self._walks.get(model)
        facts = walk.describe() if walk is not None else {}

        def abort(journal: Journal) -> tuple[int, JournalView]:
            return journal.abort(model, version, who, reason, expected, facts), self._residents.view(journal, model)

        term, self._residents.views[model] = await self._journal.call(abort, patience_seconds)
        if walk is not None and walk.version == version:
            walk.state = aborted(walk.state, reason)
        self._traffic.remove_canary(model, term)
        self._residents.wake()
        log.info("%s version %s: aborted by %s: %s", model, version, who, reason)
        return term

    async def abort_all(self, reason: str) -> None:
        """Every rollout that the journal has open: the host ends for good, and its engines with it."""
        for model in self._site.models:
            try:
                pointers = (await self._residents.read(model)).pointers
                if pointers.canary is not None:
                    await self.abort(model, HOST, reason, pointers)
            except MansardError as error:  # the next host finds it open, and cannot walk on without its engine
                log.error("%s: %s: %s", model, reason, error)

    def engine_ended(self, engine: Engine) -> None:
        """The engine of a canary died: the next tick aborts."""
        for walk in self._walks.values():
            if walk.canary.engine is engine:
                walk.canary.blame(f"its engine died: {engine.problem}")

    async def close(self) -> None:
        """End the controllers. What the journal still has open (`abort_all` closes it) is the next host's."""
        for resuming in self._resuming.values():
            resuming.cancel()
        await asyncio.gather(*self._resuming.values(), return_exceptions=True)
        for walker, task in self._tasks.values():
            walker.leave_open()
            task.cancel()
        await asyncio.gather(*(task for _, task in self._tasks.values()), return_exceptions=True)


def _started(journal: Journal, model: str, version: int) -> int:
    """The sequence of the newest start of a rollout of `version`."""
    return [e.sequence for e in journal.entries(model, kinds=(ROLLOUT_STARTED,)) if e.version == version][-1]
