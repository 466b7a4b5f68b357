"""Keeps the engines of versions in service running: stable, canary, and those that a rollback may go to.

Guarantees: an engine of stable or of an earlier version in the rollback window that dies is started again, later each
time; the split file names an endpoint only while its engine is ready. A canary's engine is the rollout's: it is not
started again, because its death ends the rollout.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from mansard.errors import MansardError
from mansard.release.journal import Journal
from mansard.release.window import resident_versions
from mansard.serving.engine import Engine
from mansard.serving.engine_command import EngineIdentity
from mansard.serving.host_engines import Engines
from mansard.serving.host_traffic import Traffic
from mansard.site import Site
from mansard.specs import Serve

LOOK_SECONDS = 2.0
"""How often the journal is looked at for moves that another process made."""
MAX_BACKOFF_SECONDS = 60.0

log = logging.getLogger(__name__)

WarnFingerprint = Callable[[str, int, Engine], Awaitable[None]]
"""Compares the fingerprint of (model, version) with the recorded one and says so when it differs."""


class Residents:
    """`engines` is set once, right after construction: engines ask this object what is pinned."""

    def __init__(self, site: Site, journal: Journal, traffic: Traffic, warn_fingerprint: WarnFingerprint) -> None:
        self.engines: Engines
        self._site = site
        self._journal = journal
        self._traffic = traffic
        self._warn_fingerprint = warn_fingerprint
        self._identities: dict[tuple[str, int], EngineIdentity] = {}
        self._starts: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._failures: dict[tuple[str, int], int] = {}
        self._not_before: dict[tuple[str, int], float] = {}
        self._wakes = asyncio.Event()

    def identity(self, model: str, version: int) -> EngineIdentity:
        """What serves a version. BadInput for one that is not registered."""
        key = (model, version)
        if key not in self._identities:
            registration = self._journal.registration(model, version)
            self._identities[key] = EngineIdentity(
                registration.artifact, model, Serve.model_validate(registration.serve, strict=False)
            )
        return self._identities[key]

    def versions(self, model: str) -> list[int]:
        """Versions that stay resident; stable first."""
        pointers = self._journal.pointers(model)
        return resident_versions(self._journal.moves(model), model, pointers, self._site.rollback_window)

    def pinned(self) -> set[str]:
        """Keys of engines that may not be stopped to make room."""
        return {self.identity(m, v).key for m in self._site.models for v in self.versions(m)}

    def endpoint(self, model: str, version: int) -> str | None:
        """Where a version answers; None while it does not."""
        engine = self.engines.find(self.identity(model, version))
        return engine.endpoint if engine is not None and engine.state == "ready" else None

    async def start(self, model: str, version: int) -> Engine:
        """The version's engine, ready, and its fingerprint compared: a change is a warning of the engine."""
        identity = self.identity(model, version)
        is_fresh = not self.engines.is_ready(identity)
        engine = await self.engines.ensure(identity)
        if is_fresh:
            await self._warn_fingerprint(model, version, engine)
        return engine

    def warnings(self, model: str, version: int) -> list[str]:
        """What its engine warned of at its last start."""
        engine = self.engines.find(self.identity(model, version))
        return [] if engine is None or not engine.warning else [f"version {version}: {engine.warning}"]

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
                        self.look(model)
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

    def look(self, model: str) -> None:
        """Bring split and engines in line with the journal; starts go on in the background."""
        pointers = self._journal.pointers(model)
        versions = self.versions(model)
        if pointers.stable is None:
            return
        if pointers.canary is None:
            # Another process may have moved the pointers while this one hung.
            stable_endpoint = self.endpoint(model, pointers.stable)
            self._traffic.follow_pointers(model, pointers, stable_endpoint, self._journal.term())
        self._traffic.hold_endpoints(model, {v: self.endpoint(model, v) for v in versions if v != pointers.canary})
        for version in versions:
            if version != pointers.canary and not self.engines.is_ready(self.identity(model, version)):
                self._start_later(model, version)

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
        except MansardError as error:
            self._failures[key] = self._failures.get(key, 0) + 1
            wait_seconds = min(2.0 ** self._failures[key], MAX_BACKOFF_SECONDS)
            self._not_before[key] = time.monotonic() + wait_seconds
            log.error("%s version %d: %s; the next try in %.0f s", model, version, error, wait_seconds)
            return
        self._failures.pop(key, None)
        log.info("%s version %d: ready at %s after %s s", model, version, engine.endpoint, engine.start_seconds)
        self.wake()
