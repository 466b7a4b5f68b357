"""Outages of stable: its engine ended, and the version before it serves its users until it is back.

Guarantees: users come first: the traffic split moves from what the last look at the journal said, without asking the
journal, and the entry follows, later where its database is down (people are notified at once then). No pointer moves;
a rollback or a promotion during the outage is for good. Stable serves again when its engine is up and answers the guard
prompts as evaluation recorded them. The split itself remembers who stands in, so the next host goes on. Does not cover:
starting engines (residents.py); an engine that hangs; `when_stable_is_dead: wait` tells, and moves nothing.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mansard.errors import Conflict, JournalDown, MansardError
from mansard.release.events import Entry, Pointers, Uptime, as_text, uptime_now, utc_now
from mansard.release.notify import notify
from mansard.release.outage import open_outage, outage_intervals, stand_ins
from mansard.serving.engine.engine import Engine
from mansard.serving.host.canary import FindFingerprintChange
from mansard.serving.host.fingerprint import ANSWERS_SECONDS
from mansard.serving.host.journal_calls import JournalCalls
from mansard.serving.host.journal_view import JournalView
from mansard.serving.host.notices import notice_of
from mansard.serving.host.past import Interval
from mansard.serving.host.residents import Residents
from mansard.serving.host.traffic import Traffic
from mansard.site import Site

COMPARE_AGAIN_SECONDS = 10.0
"""Between two comparisons of a fingerprint that was not the recorded one."""
NOTIFY_SECONDS = 2.0
"""An outage that the journal has not taken by then is told to people without it."""
HOST = "host"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Standing:
    """A model as the last look at the journal found it. `stand_ins` may serve stable's users, best first; `intervals`
    are when stable was down, in seconds since the boot."""

    pointers: Pointers
    stand_ins: tuple[int, ...]
    intervals: tuple[Interval, ...] = ()


@dataclass(slots=True)
class StableOutage:
    """`version` is stable and has no engine to trust; `to` serves its users (None: nobody). `why` is the newest reason;
    `journaled` is (to, why) of the newest entry about it, and `end_why` says that it is over."""

    version: int
    why: str
    since: Uptime = field(default_factory=uptime_now)
    at: str = field(default_factory=lambda: as_text(utc_now()))
    to: int | None = None
    journaled: tuple[int | None, str] | None = None
    is_notified: bool = False
    end: tuple[str, Uptime] | None = None


class Outages:
    """One outage a model at most. `lost` are keys of engines that ended while no host ran."""

    def __init__(
        self,
        site: Site,
        journal: JournalCalls,
        traffic: Traffic,
        residents: Residents,
        find_fingerprint_change: FindFingerprintChange,
    ) -> None:
        self.lost: set[str] = set()
        self._site = site
        self._journal = journal
        self._traffic = traffic
        self._residents = residents
        self._find_fingerprint_change = find_fingerprint_change
        self._standings: dict[str, Standing] = {}
        self._outages: dict[str, StableOutage] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._comparisons: dict[str, asyncio.Task[None]] = {}
        self._writers: dict[str, asyncio.Task[None]] = {}

    def find(self, model: str) -> StableOutage | None:
        """The outage that users feel now, or None."""
        outage = self._outages.get(model)
        return None if outage is None or outage.end is not None else outage

    def describe(self, model: str) -> dict[str, object] | None:
        outage = self.find(model)
        if outage is None:
            return None
        return {"version": outage.version, "served_by": outage.to, "since": outage.at, "why": outage.why}

    def intervals(self, model: str) -> list[Interval]:
        """When stable's engine was down since the boot, the outage that goes on included, on the monotonic clock."""
        down = down_intervals(self._standings.get(model), self._outages.get(model), uptime_now().boot)
        shift = time.monotonic() - time.clock_gettime(time.CLOCK_BOOTTIME)
        return [(begin + shift, end + shift) for begin, end in down]

    def check_free(self, model: str) -> None:
        """Conflict while stable is down: no canary can be compared with it."""
        outage = self.find(model)
        if outage is not None:
            raise Conflict(
                f"{model}: version {outage.version} (stable) is down since {outage.at}, so no canary can be compared "
                f"with it; wait until it is back, or leave it: mansard rollback --from {outage.version}"
            )

    def engine_ended(self, engine: Engine) -> None:
        """An engine ended by itself. Users are moved before anything else happens; the entry follows."""
        for model, standing in self._standings.items():
            stable, outage = standing.pointers.stable, self.find(model)
            if stable is None:
                continue
            if self._residents.place(model, stable).engine.key == engine.identity.key:
                self._stop_comparison(model)
                if outage is None:
                    self._outages[model] = StableOutage(stable, engine.problem)
            if self.find(model) is not None:
                self._serve(model)
                self._write_later(model)

    def look(self, model: str, view: JournalView) -> None:
        """Bring the outage, the split and, in the background, the journal in line."""
        is_first = model not in self._standings
        pointers, moves = view.pointers, view.moves
        window = self._site.rollback_window
        able = tuple(stand_ins(moves, model, pointers, window))
        down = () if pointers.stable is None else outage_intervals(moves, model, pointers.stable, uptime_now().boot)
        self._standings[model] = Standing(pointers, able, tuple(down))
        outage = self._outages.get(model)
        if outage is not None and outage.version != pointers.stable:
            log.info("%s: version %d is stable no more; its outage is over", model, outage.version)
            self._forget(model)
            outage = None
        if outage is None:
            outage = self._outage_before(model, pointers, moves, is_first)
        if outage is None:
            return
        self._outages[model] = outage
        if outage.end is None:
            self._serve(model)
            self._watch_return(model, outage)
        self._write_later(model)

    async def close(self) -> None:
        tasks = [*self._comparisons.values(), *self._writers.values(), *self._background]
        for task in self._comparisons.values():
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _outage_before(
        self, model: str, pointers: Pointers, moves: Sequence[Entry], is_first: bool
    ) -> StableOutage | None:
        """One that the host before this one saw, or that happened while none ran (told at the first look)."""
        stable = pointers.stable
        if stable is None:
            return None
        served = self._traffic.split().models.get(model)
        to = served.stable if served is not None and served.stands_in_for == stable else None
        entry = open_outage(moves, model)
        if entry is not None:
            since = Uptime(**entry.first.body["since"])
            outage = StableOutage(stable, entry.last.why, since, entry.first.at, to)
            return replace(outage, journaled=(entry.to, entry.last.why))
        is_lost = is_first and self._residents.place(model, stable).engine.key in self.lost
        if to is None and not is_lost:
            return None
        return StableOutage(stable, "its engine ended while no host or no journal was there", to=to)

    def _serve(self, model: str) -> None:
        """Send stable's users to a version that answers, if there is one; back to stable's name if there is none."""
        outage = self._outages[model]
        to = self._choose(model, outage)
        endpoint = self._residents.endpoint(model, outage.version if to is None else to)
        try:
            is_moved = self._traffic.stand_in(model, outage.version if to is None else to, endpoint, outage.version)
        except (MansardError, OSError) as error:  # another writer was quicker, or the disk is full; the next look tries
            log.error("%s: version %s does not serve the users of %d yet: %s", model, to, outage.version, error)
            return
        if is_moved and outage.to != to:
            log.error("%s: version %d is down; its users are served by %s", model, outage.version, to or "nobody")
            outage.to = to

    def _choose(self, model: str, outage: StableOutage) -> int | None:
        """Whoever stands in already while it answers: users are moved no more often than they must be."""
        if self._site.when_stable_is_dead == "wait":
            return None
        able = [v for v in self._standings[model].stand_ins if self._residents.endpoint(model, v) is not None]
        if outage.to in able:
            return outage.to
        return able[0] if able else None

    def _watch_return(self, model: str, outage: StableOutage) -> None:
        """Once stable's engine is up: at once where nobody else serves, else when its fingerprint is right."""
        if self._residents.endpoint(model, outage.version) is None:
            return
        if outage.to is None:
            self._stop_comparison(model)
            self._end(model, "its engine is up again")
            return
        if model in self._comparisons:
            return
        task = asyncio.create_task(self._compare(model, outage), name=f"return of {model} {outage.version}")
        self._comparisons[model] = task
        task.add_done_callback(lambda ended: self._forget_comparison(model, ended))

    async def _compare(self, model: str, outage: StableOutage) -> None:
        """Until the fingerprint is the recorded one; ends too when the engine or the outage does."""
        while self.find(model) is outage:
            engine = self._residents.engines.find(self._residents.place(model, outage.version).engine)
            if engine is None or self._residents.endpoint(model, outage.version) is None:
                return
            try:
                change = await self._find_fingerprint_change(model, outage.version, engine, ANSWERS_SECONDS)
                why = f"its engine is up again, but its fingerprint is not the recorded one: {change}" if change else ""
            except (MansardError, OSError) as error:
                why = f"its engine is up again, but its fingerprint could not be compared: {error}"
            if self.find(model) is not outage or engine.state != "ready":
                return
            if not why:
                self._end(model, "its engine is up again and answers as evaluation recorded")
                self._write_later(model)
                return
            if outage.why.partition(":")[0] != why.partition(":")[0]:  # another entry where it says another thing
                outage.why = why
                self._write_later(model)
            await asyncio.sleep(COMPARE_AGAIN_SECONDS)

    def _end(self, model: str, why: str) -> None:
        """Stable serves its own users again; the entry follows."""
        outage = self._outages[model]
        try:
            endpoint = self._residents.endpoint(model, outage.version)
            if not self._traffic.stand_in(model, outage.version, endpoint, outage.version):
                return  # somebody made another version stable; the next look sees it
        except (MansardError, OSError) as error:
            log.error("%s: version %d does not serve again yet: %s", model, outage.version, error)
            return
        log.info("%s: version %d serves its users again: %s", model, outage.version, why)
        outage.end = (why, uptime_now())

    def _write_later(self, model: str) -> None:
        """In the background, one writer a model: it goes on until the journal has all."""
        if model not in self._writers:
            task = asyncio.create_task(self._write(model, self._outages[model]), name=f"outage of {model}")
            self._writers[model] = task
            task.add_done_callback(lambda _: self._writers.pop(model))

    async def _write(self, model: str, outage: StableOutage) -> None:
        """The entries that are missing in the journal; later, with people notified now, while its database is down."""
        timer = asyncio.get_running_loop().call_later(NOTIFY_SECONDS, self._notify_now, model, outage)
        try:
            while self._outages.get(model) is outage and await self._write_next(model, outage):
                pass
        except Conflict as error:
            log.warning("%s: %s; the next look at the journal decides", model, error)
        except JournalDown as error:
            log.error("%s: the outage of version %d is written down later: %s", model, outage.version, error)
            self._notify_now(model, outage)
        except (MansardError, OSError) as error:
            log.error("%s: the outage of version %d is not written down: %s", model, outage.version, error)
        finally:
            timer.cancel()

    async def _write_next(self, model: str, outage: StableOutage) -> bool:
        """One entry, if one is missing. Whether there was one, and another may be missing."""
        pointers, state = self._standings[model].pointers, (outage.to, outage.why)
        if outage.journaled != state and (outage.end is None or outage.journaled is None):
            facts = {"notified": True} if outage.is_notified else {}
            move = (model, outage.to, HOST, outage.why, pointers, outage.since, facts)
            await self._journal.call(lambda journal: journal.stable_down(*move))
            outage.journaled, outage.is_notified = state, False
            return True
        if outage.end is not None:
            why, since = outage.end
            await self._journal.call(lambda journal: journal.stable_up(model, HOST, why, pointers, since))
            if self._outages.get(model) is outage:
                self._forget(model)
        return False

    def _notify_now(self, model: str, outage: StableOutage) -> None:
        """People hear of it before the journal does; once."""
        if outage.is_notified or outage.journaled is not None or outage.end is not None:
            return
        outage.is_notified = True
        body = {"version": outage.version, "to": outage.to}
        notice = notice_of(Entry(0, model, "stable_down", outage.at, HOST, outage.why, body, "", ""))
        assert notice is not None, "people hear of every outage"
        task = asyncio.create_task(self._call_program(notice), name=f"notify of {model}")
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _call_program(self, notice: dict[str, object]) -> None:
        trouble = await asyncio.to_thread(notify, self._site, **notice)  # type: ignore[arg-type]
        if trouble:
            log.error("%s", trouble)

    def _forget(self, model: str) -> None:
        self._stop_comparison(model)
        self._outages.pop(model, None)

    def _stop_comparison(self, model: str) -> None:
        task = self._comparisons.pop(model, None)
        if task is not None and task is not _current_task():
            task.cancel()

    def _forget_comparison(self, model: str, ended: "asyncio.Task[None]") -> None:
        if self._comparisons.get(model) is ended:
            del self._comparisons[model]
        if not ended.cancelled() and ended.exception() is not None:
            log.error("%s: %s", model, ended.exception())


def down_intervals(standing: Standing | None, outage: StableOutage | None, boot: str) -> list[Interval]:
    """In seconds since the boot. What the host knows before the journal does is of this boot; the journal has the rest.
    """
    down = [] if standing is None else list(standing.intervals)
    if outage is not None and outage.since.boot == boot:
        down.append((outage.since.seconds, math.inf if outage.end is None else outage.end[1].seconds))
    return down


def _current_task() -> "asyncio.Task[None] | None":
    with contextlib.suppress(RuntimeError):
        return asyncio.current_task()
    return None
