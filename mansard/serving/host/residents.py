"""Keeps the engines of versions in service running: stable, canary, and those that a rollback may go to.

Guarantees: an engine of stable or of an earlier version in the rollback window that dies is started again, later each
time; the split file names an endpoint only while its engine is ready, also while the journal gives no answer (the last
look's view counts then). A canary's engine is the rollout's: it is not started again, because its death ends the
rollout.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from mansard.errors import JournalDown, MansardError
from mansard.records import Registration
from mansard.release.journal import Journal
from mansard.serving.engine.engine import Engine
from mansard.serving.host.engines import Engines
from mansard.serving.host.journal_calls import JournalCalls
from mansard.serving.host.journal_view import JournalView, view_of
from mansard.serving.host.place import Place, branch_folder, place_of
from mansard.serving.host.traffic import Traffic
from mansard.site import Site
from mansard.store.store import Store

LOOK_SECONDS = 2.0
"""How often the journal is looked at for moves that another process made."""
PATIENCE_SECONDS = 1.0
"""A look goes on without a journal on another machine that has not answered by then."""
MAX_BACKOFF_SECONDS = 60.0

log = logging.getLogger(__name__)

WarnFingerprint = Callable[[str, int, Engine], Awaitable[None]]
"""Compares the fingerprint of (model, version) with the recorded one and says so when it differs."""


class LooksAtOutages(Protocol):
    """What has to know of every look at a model."""

    def look(self, model: str, view: JournalView) -> None: ...


class Residents:
    """`engines` and `outages` are set once, right after construction: both ask this object."""

    def __init__(
        self, site: Site, journal: JournalCalls, store: Store, traffic: Traffic, warn_fingerprint: WarnFingerprint
    ) -> None:
        self.engines: Engines
        self.outages: LooksAtOutages
        self.views: dict[str, JournalView] = {}
        self._site = site
        self._journal = journal
        self._traffic = traffic
        self._warn_fingerprint = warn_fingerprint
        self._store = store
        self._places: dict[tuple[str, int], Place] = {}
        self._registrations: dict[tuple[str, int], Registration] = {}
        self._starts: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._failures: dict[tuple[str, int], int] = {}
        self._not_before: dict[tuple[str, int], float] = {}
        self._wakes = asyncio.Event()

    async def read(self, model: str, patience_seconds: float | None = None) -> JournalView:
        """The model as the journal has it now; kept as the view that counts until the next one."""
        view = await self._journal.call(lambda journal: self.view(journal, model), patience_seconds)
        self.views[model] = view
        return view

    def view(self, journal: Journal, model: str) -> JournalView:
        """The same inside a call of the journal; the caller puts it into `views` when it goes on."""
        return view_of(journal, model, self._site.rollback_window)

    async def locate(self, model: str, version: int) -> Place:
        """Where a version answers, from journal and store the first time. BadInput for one that is not registered."""
        key = (model, version)
        if key not in self._places:
            registration = await self._journal.call(lambda journal: journal.registration(model, version))
            self._registrations[key] = registration  # what it says of its place, no later judgement may change
            self._places[key] = await asyncio.to_thread(place_of, self._site, self._store, registration)
        return self._places[key]

    def place(self, model: str, version: int) -> Place:
        """The same for one that was located."""
        return self._places[model, version]

    def name(self, model: str, version: int) -> str:
        """What a request asks the version's engine for."""
        return self.place(model, version).name

    def versions(self, model: str) -> list[int]:
        """Versions that stay resident and were located; stable first."""
        view = self.views.get(model)
        return [] if view is None else [v for v in view.resident if (model, v) in self._places]

    def pinned(self) -> set[str]:
        """Keys of engines that may not be stopped to make room."""
        return {self.place(m, v).engine.key for m in self._site.models for v in self.versions(m)}

    def endpoint(self, model: str, version: int) -> str | None:
        """Where a version answers; None while it does not."""
        place = self._places.get((model, version))
        engine = None if place is None else self.engines.find(place.engine)
        if place is None or engine is None or engine.state != "ready":
            return None
        return engine.endpoint if place.branch is None or place.name in engine.branches else None

    async def ready(self, model: str, version: int) -> Engine:
        """The version's engine, ready, with its branch where it has one. MansardError when it does not come up."""
        place = await self.locate(model, version)
        if place.branch is not None and not self.engines.is_ready(place.engine):
            # The artifact with slots is nobody's version: collect may have taken it.
            await asyncio.to_thread(place_of, self._site, self._store, self._registrations[model, version])
        engine = await self.engines.ensure(place.engine)
        if place.branch is not None:
            folder = await asyncio.to_thread(branch_folder, self._site, self._store, place.branch)
            await engine.hold_branch(place.name, folder)
        return engine

    async def start(self, model: str, version: int) -> Engine:
        """The version's engine, ready, and its fingerprint compared: a change is a warning of the engine."""
        is_fresh = self.endpoint(model, version) is None
        engine = await self.ready(model, version)
        if is_fresh:
            await self._warn_fingerprint(model, version, engine)
        return engine

    async def retire(self, model: str, version: int) -> None:
        """A version that is not to be trusted: its engine ends, unless one in service needs it; then its branch."""
        place = self.place(model, version)
        self.engines.retire(place.engine)
        engine = self.engines.find(place.engine)
        if place.branch is not None and engine is not None and not self._serves_branch(place):
            await engine.drop_branch(place.name)

    def _serves_branch(self, place: Place) -> bool:
        return any(self.place(m, v) == place for m in self._site.models for v in self.versions(m))

    def shares_engine(self, model: str, version: int) -> bool:
        """Whether the engine of a version also serves another version's users."""
        key = self.place(model, version).engine.key
        roles = {(m, v) for m, view in self.views.items() for v in (view.pointers.stable, view.pointers.canary)}
        others = (place for at, place in self._places.items() if at in roles and at != (model, version))
        return any(place.engine.key == key for place in others)

    def warnings(self, model: str, version: int) -> list[str]:
        """What its engine warned of at its last start."""
        place = self.place(model, version)
        engine = self.engines.find(place.engine)
        warning = "" if engine is None else engine.warnings.get(place.name, "")
        return [f"version {version}: {warning}"] if warning else []

    def wake(self) -> None:
        """Look again now: a pointer moved or an engine ended."""
        self._wakes.set()

    async def run(self) -> None:
        """Look at every model, until cancelled."""
        is_moved = False
        try:
            while True:
                self._wakes.clear()
                for model in self._site.models:
                    try:
                        await self.look(model)
                    except (MansardError, OSError) as error:  # what serves goes on serving; the next look tries again
                        log.error("%s: %s", model, error)
                if is_moved:
                    self.engines.retire_left()
                try:
                    await asyncio.wait_for(self._wakes.wait(), LOOK_SECONDS)
                    is_moved = True
                except TimeoutError:
                    is_moved = False
        finally:
            for task in self._starts.values():
                task.cancel()

    async def look(self, model: str) -> None:
        """Bring split and engines in line with the journal; starts go on in the background.

        Where the journal gives no answer, engines and their endpoints are looked after all the same.
        """
        is_answered = await self._read_if_answered(model)
        await self._locate_residents(model)
        view, versions = self.views[model], self.versions(model)  # nothing is awaited from here on
        pointers = view.pointers
        if pointers.stable is None:
            return
        if pointers.canary is None and is_answered:
            # Another process may have moved the pointers while this one hung.
            stable_endpoint = self.endpoint(model, pointers.stable)
            self._traffic.follow_pointers(model, pointers, stable_endpoint, view.term)
        self._traffic.hold_endpoints(model, {v: self.endpoint(model, v) for v in versions if v != pointers.canary})
        for version in versions:
            if version != pointers.canary and self.endpoint(model, version) is None:
                self._start_later(model, version)
        self.outages.look(model, view)

    async def _read_if_answered(self, model: str) -> bool:
        try:
            await self.read(model, PATIENCE_SECONDS)
        except JournalDown as error:
            if model not in self.views:
                raise
            log.error("%s: %s; its engines are looked after as the journal had it last", model, error)
            return False
        return True

    async def _locate_residents(self, model: str) -> None:
        """A version whose place the store does not tell is left out for now, unless it is stable."""
        for version in self.views[model].resident:
            try:
                await self.locate(model, version)
            except (MansardError, OSError) as error:
                if version == self.views[model].pointers.stable:
                    raise
                log.error("%s version %d: %s", model, version, error)

    def _start_later(self, model: str, version: int) -> None:
        key = (model, version)
        if key in self._starts or time.monotonic() < self._not_before.get(key, 0.0):
            return
        task = asyncio.create_task(self._start(model, version), name=f"resident {model} {version}")
        self._starts[key] = task
        task.add_done_callback(lambda _: self._starts.pop(key, None))

    async def _start(self, model: str, version: int) -> None:
        key = (model, version)
        try:
            engine = await self.start(model, version)
        except (MansardError, OSError) as error:
            self._failures[key] = self._failures.get(key, 0) + 1
            wait_seconds = min(2.0 ** self._failures[key], MAX_BACKOFF_SECONDS)
            self._not_before[key] = time.monotonic() + wait_seconds
            log.error("%s version %d: %s; the next try in %.0f s", model, version, error, wait_seconds)
            return
        self._failures.pop(key, None)
        log.info("%s version %d: ready at %s after %s s", model, version, engine.endpoint, engine.start_seconds)
        self.wake()
