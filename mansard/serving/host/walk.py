"""The controller of one rollout: observes, asks the pure state machine, does what it says, until the walk is over.

Guarantees: a move is journaled (compare-and-swap) before the split shows it, with nothing else in between; the lease is
renewed every second while a canary has traffic; whatever ends the walk (a person, a dead engine, an error in here)
takes the canary to 0 %. Killed at any point, the next host takes the walk up from the journal (rollouts.py). Does not
cover: which rollouts there are, and the decisions (release/rollout.py).
"""

import asyncio
import logging
import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from mansard.errors import Conflict, JournalDown, MansardError
from mansard.release.analysis import Finding, judge
from mansard.release.events import Pointers
from mansard.release.journal import Journal
from mansard.release.pointer import last_move
from mansard.release.rollout import Abort, Action, Look, Observation, Promote, SetWeight, State, aborted, advance
from mansard.serving.host.canary import Canary
from mansard.serving.host.engine_accounts import EngineAccounts
from mansard.serving.host.journal_calls import JournalCalls
from mansard.serving.host.journal_view import JournalView
from mansard.serving.host.outages import Outages
from mansard.serving.host.residents import Residents
from mansard.serving.host.traffic import Traffic
from mansard.serving.host.windows import Windows

TICK_SECONDS = 0.5
WORKERS_SECONDS = 30.0
"""A worker that did not take a step by then ends the rollout; until it takes it, it sends the canary nothing more."""
PATIENCE_SECONDS = 2.0
"""An abort that a remote journal has not taken by then ends by the lease, and is written later."""
HOST = "host"
"""Who the journal names for what the controller decided itself."""

log = logging.getLogger(__name__)


class AbortRollout(Protocol):
    """Journal the abort, take the canary to 0 %, end the walk. Returns the term. Conflict when the world moved."""

    async def __call__(
        self, model: str, who: str, reason: str, expected: Pointers, patience_seconds: float | None = None
    ) -> int: ...


@dataclass(slots=True)
class Walk:
    """One rollout while it runs and after it ended. `pointers` are the journal's after our own last move."""

    model: str
    version: int
    who: str
    pointers: Pointers
    state: State
    canary: Canary
    windows: Windows | None
    engines: EngineAccounts
    seen: Observation = field(default_factory=Observation)
    counts: dict[str, Any] = field(default_factory=dict)
    found: tuple[Finding, ...] = ()

    def describe(self) -> dict[str, Any]:
        state, seen = self.state, self.seen
        return {
            "state": state.phase,
            "version": self.version,
            "who": self.who,
            "step": state.step + 1 if state.phase != "starting" and state.plan.steps else 0,
            "steps": len(state.plan.steps),
            "attempt": state.attempt + 1,
            "weight_percent": state.weight_percent,
            "reason": state.reason,
            "observations": {
                "seconds_in_step": round(seen.seconds_in_step, 1),
                **{side: asdict(counts) for side, counts in self.counts.items()},
                "consecutive_failures": seen.consecutive_failures,
                "looks": state.looks,
                "findings": [_finding_json(finding) for finding in self.found],
                "engines": self.engines.describe(),
            },
        }


def _finding_json(finding: Finding) -> dict[str, Any]:
    """JSON has no infinity."""
    tree = {**asdict(finding), "text": finding.text()}
    tree["interval"] = [_number(value) for value in finding.interval]
    return {key: _number(value) if isinstance(value, float) else value for key, value in tree.items()}


def _number(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


class Walker:
    """Walks one `Walk`."""

    def __init__(
        self,
        walk: Walk,
        journal: JournalCalls,
        traffic: Traffic,
        residents: Residents,
        outages: Outages,
        abort: AbortRollout,
    ) -> None:
        self._walk = walk
        self._journal = journal
        self._traffic = traffic
        self._residents = residents
        self._outages = outages
        self._abort = abort
        self._findings: tuple[Finding, ...] | None = None  # of the last look, until the next tick
        self._is_left_open = False

    def leave_open(self) -> None:
        """The next host takes the walk up: being cancelled is no reason to abort."""
        self._is_left_open = True

    async def run(self) -> None:
        walk = self._walk
        helpers = [asyncio.create_task(walk.canary.prepare())]
        try:
            while not walk.state.is_over:
                await asyncio.sleep(TICK_SECONDS)
                self._check_open()
                await self._tick()
                if walk.state.phase == "canary" and len(helpers) == 1:
                    helpers.append(asyncio.create_task(walk.canary.hold_lease()))
                    helpers.append(asyncio.create_task(walk.canary.ask_guard_prompts()))
                    helpers.append(asyncio.create_task(walk.engines.run()))
        except (MansardError, OSError) as error:  # a race lost to another process, a full disk, no journal
            for helper in helpers:
                helper.cancel()
            await self._end_when_journaled(str(error))
        finally:
            for helper in helpers:
                helper.cancel()
            if not walk.state.is_over and not self._is_left_open:
                await self._end_after_error("the controller ended")

    def _check_open(self) -> None:
        """Conflict where somebody else ended the rollout in the journal, as a rollback without this host does."""
        walk, view = self._walk, self._residents.views[self._walk.model]
        if walk.state.is_over or view.pointers.canary == walk.version:
            return
        last = last_move(view.moves, walk.model)
        raise Conflict("its canary left the journal" if last is None else f"{last.kind} by {last.who}: {last.why}")

    async def _tick(self) -> None:
        walk = self._walk
        findings, self._findings = self._findings, None
        walk.seen = await self._observe(findings)
        before = walk.state
        following, actions = advance(before, walk.seen)
        if not actions:
            walk.state = following
        for action in actions:
            await self._do(action, before, following)

    async def _observe(self, findings: tuple[Finding, ...] | None) -> Observation:
        walk, canary = self._walk, self._walk.canary
        if walk.state.phase != "canary" or walk.windows is None:
            is_stable_down = self._outages.find(walk.model) is not None
            return Observation(is_ready=canary.is_ready, problem=canary.problem, is_stable_down=is_stable_down)
        reports, is_heard = await walk.windows.read()
        walk.counts, run = walk.windows.counts(reports)
        walk.engines.waiting = walk.windows.waiting(reports)
        if walk.engines.hung:
            canary.blame(walk.engines.hung)
        return Observation(
            seconds_in_step=time.monotonic() - walk.windows.step_began,
            requests=walk.counts["canary"].requests,
            consecutive_failures=run,
            is_ready=canary.is_ready,
            is_heard=is_heard,
            problem=canary.problem,
            findings=findings,
            engines=walk.engines.text(),
            is_stable_down=self._outages.find(walk.model) is not None,
        )

    async def _do(self, action: Action, before: State, following: State) -> None:
        walk = self._walk
        if walk.state is not before:
            return  # a person ended it while the workers were asked
        if isinstance(action, Look):
            walk.state = following
            await self._look(action)
        elif isinstance(action, SetWeight):
            await self._set_weight(action, before, following)
        elif isinstance(action, Promote):
            await self._promote(action, following)
        elif isinstance(action, Abort):
            await self._abort(walk.model, HOST, action.reason, walk.pointers, PATIENCE_SECONDS)
            await self._residents.retire(walk.model, walk.version)

    async def _look(self, action: Look) -> None:
        walk = self._walk
        assert walk.windows is not None, "a look has a step"
        sample = walk.windows.sample(walk.state.weight_percent)
        seed = walk.version * 1_000_003 + walk.state.step * 1009 + walk.state.looks
        walk.found = await asyncio.to_thread(judge, sample, walk.state.plan.limits, action.alpha, seed)
        self._findings = walk.found

    async def _set_weight(self, action: SetWeight, before: State, following: State) -> None:
        """Journal, then split, then see that every worker took it; the step's clock and counts begin with it."""
        walk, engine = self._walk, self._walk.canary.engine
        assert engine is not None and walk.windows is not None, "a canary has an engine, and a stable beside it"
        reports, is_heard = await walk.windows.read()
        await walk.engines.ask(0.0)
        if walk.state is not before or walk.canary.problem or not is_heard:
            return  # a worker that did not tell its counts now would make them look like the step's; next tick again
        facts, weight = walk.describe(), action.weight_percent
        walk.windows.begin_step(reports)
        walk.engines.begin_step()
        expected, why = walk.pointers, action.reason

        def step(journal: Journal) -> tuple[int, JournalView]:
            term = journal.step(walk.model, walk.version, weight, HOST, why, expected, facts)
            return term, self._residents.view(journal, walk.model)

        term = self._moved(await self._journal.call(step))
        walk.state, walk.found = following, ()
        self._traffic.set_canary(walk.model, walk.version, engine.endpoint, weight, term, walk.windows.salt)
        log.info("%s version %d: %s", walk.model, walk.version, following.reason)
        behind = await self._traffic.unconfirmed_workers(term, WORKERS_SECONDS)
        if behind:
            walk.canary.blame(f"{', '.join(behind)} did not take term {term} with {weight} % for the canary")

    async def _promote(self, action: Promote, following: State) -> None:
        walk, engine = self._walk, self._walk.canary.engine
        assert engine is not None, "a canary has an engine"
        expected, facts = walk.pointers, walk.describe()

        def promote(journal: Journal) -> tuple[int, JournalView]:
            term = journal.promote(walk.model, walk.version, HOST, action.reason, expected, facts)
            return term, self._residents.view(journal, walk.model)

        term = self._moved(await self._journal.call(promote))
        walk.state = following
        self._traffic.set_stable(walk.model, walk.version, engine.endpoint, term)
        self._residents.wake()
        log.info("%s version %d: promoted: %s", walk.model, walk.version, following.reason)

    def _moved(self, move: tuple[int, JournalView]) -> int:
        """The term of our own move; its view is what counts now."""
        term, view = move
        self._residents.views[self._walk.model] = view
        self._walk.pointers = view.pointers
        return term

    async def _end_when_journaled(self, reason: str) -> None:
        """Without a journal to write to, the lease runs out and takes the canary to 0 %; the abort is written later."""
        what, told = f"{self._walk.model} version {self._walk.version}", False
        while True:
            try:
                await self._end_after_error(reason)
                return
            except JournalDown as error:
                if not told:
                    log.error("%s: to be aborted: %s: %s", what, reason, error)
                told = True
                await asyncio.sleep(TICK_SECONDS)

    async def _end_after_error(self, reason: str) -> None:
        """The journal decides what is true: abort what it still has open, then show that in the split."""
        walk = self._walk
        pointers = (await self._residents.read(walk.model)).pointers
        if pointers.canary == walk.version:
            await self._abort(walk.model, HOST, reason, pointers)
        if pointers.stable is not None:
            await self._residents.locate(walk.model, pointers.stable)
        view = await self._residents.read(walk.model)
        if not walk.state.is_over:
            walk.state = aborted(walk.state, reason)
        endpoint = None if pointers.stable is None else self._residents.endpoint(walk.model, pointers.stable)
        self._traffic.follow_pointers(walk.model, view.pointers, endpoint, view.term)
