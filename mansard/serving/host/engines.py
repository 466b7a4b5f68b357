"""The engines of this host: started once per identity, adopted after the host's own death, watched, stopped.

Guarantees: two callers who ask for the same engine get the same process; core sets are shared only when there are more
engines than sets; pinned engines (versions in service) are never stopped to make room; no process started by a dead
host is left over. Does not cover: which versions are in service (residents.py).
"""

import asyncio
import contextlib
import json
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import aiohttp

from mansard.canonical import canonical_json, write_atomically
from mansard.errors import BadInput, MansardError, StageFailed
from mansard.serving.engine import http as engine_http
from mansard.serving.engine.command import SHUTDOWN_SECONDS, EngineIdentity, slots_of
from mansard.serving.engine.engine import DRAIN_SECONDS, Engine
from mansard.serving.engine.log import last_words
from mansard.serving.engine.prepared import PreparedEngine, prepare
from mansard.serving.process import ProcessIdentity, group_of, send, wait_for_end, with_output_below
from mansard.site import Site
from mansard.store.store import Store

MAX_EXTRA_ENGINES = 1
"""Engines kept warm beside the pinned ones: an evaluation's engine is what a release starts next."""
PREPARED_SECONDS = 900.0
"""A prepared process that no engine came of is ended: the quantization that it was for failed, or takes long."""
RETIRE_SECONDS = 20.0
"""What the requests of an engine that failed as a canary get; then they are asked of stable or told of an error."""


class Engines:
    """`pinned` says which keys may not be stopped; `on_end(engine)` is called when one died by itself."""

    def __init__(
        self,
        site: Site,
        store: Store,
        session: aiohttp.ClientSession,
        pinned: Callable[[], set[str]],
        on_end: Callable[[Engine], None],
    ) -> None:
        self._site = site
        self._store = store
        self._session = session
        self._pinned = pinned
        self._on_end = on_end
        self.lost: set[str] = set()  # keys of engines that ended while no host watched them
        self._engines: dict[str, Engine] = {}
        self._starts: dict[str, asyncio.Task[Engine]] = {}
        self._stops: dict[str, asyncio.Task[None]] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._prepared: PreparedEngine | None = None
        self._preparing = asyncio.Lock()
        self._used: dict[str, int] = {}  # key -> when it was last asked for, by count
        self._card = asyncio.Lock()

    def describe(self) -> list[dict[str, Any]]:
        pinned = self._pinned()
        return [{**e.describe(), "pinned": key in pinned} for key, e in sorted(self._engines.items())]

    def find(self, identity: EngineIdentity) -> Engine | None:
        """The engine of this identity in whatever state, or None."""
        return self._engines.get(identity.key)

    def is_ready(self, identity: EngineIdentity) -> bool:
        engine = self.find(identity)
        return engine is not None and engine.state == "ready"

    def last_start_seconds(self, identity: EngineIdentity) -> float | None:
        """How long this engine took to start the last time, also before this host; None when nobody knows."""
        try:
            return float(json.loads(self._seconds_file(identity.key).read_text())["start_seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def adopt(self) -> list[Engine]:
        """Take over what a host before this one left running; end every engine process that cannot be taken over."""
        adopted = []
        for file in sorted((self._site.run / "engines").glob("*.json")):
            engine = Engine.adopt(file, self._site, self._session)
            if engine is None:
                self.lost.add(file.stem)
                file.unlink(missing_ok=True)
                continue
            adopted.append(engine)
            self._engines[engine.identity.key] = engine
            self._begin(engine.identity.key, self._resume(engine))
        ours = {engine.pid for engine in adopted}
        for process in with_output_below(self._site.logs / "engines"):
            if group_of(process) not in ours:
                self._in_background(_end(process), f"end orphan {process.pid}")
        return adopted

    async def ensure(self, identity: EngineIdentity, wait: bool = True) -> Engine:
        """The running engine of `identity`, started if need be. MansardError with vLLM's last lines if it fails."""
        key = identity.key
        self._used[key] = 1 + max(self._used.values(), default=0)
        known = self._engines.get(key)
        if known is not None and known.state == "ready":
            return known
        task = self._starts.get(key) or self._begin(key, self._start(identity))
        if wait:
            return await asyncio.shield(task)
        await asyncio.sleep(0)
        return self._engines[key]

    async def prepare(self, architecture: str) -> int:
        """Have a process that the next engine starts faster from, one at a time and not for long; its process id, 0
        where none can start."""
        async with self._preparing:
            prepared = self._prepared
            if prepared is None or not prepared.is_waiting():
                self._prepared = prepared = await asyncio.to_thread(prepare, self._site, architecture)
                if prepared is not None:
                    self._in_background(self._expire(prepared), "expire a prepared process")
        return 0 if prepared is None else prepared.pid

    async def stop_artifact(self, artifact: str) -> list[str]:
        """Stop the engines of an artifact that are not in service; returns their keys. BadInput for pinned ones."""
        keys = [k for k, e in self._engines.items() if e.identity.artifact == artifact]
        in_service = self._pinned().intersection(keys)
        if in_service:
            raise BadInput(f"artifact {artifact[:12]} is in service; its engine stays until another version is stable")
        for key in keys:
            await self._stop(key)
        return keys

    def retire(self, identity: EngineIdentity) -> None:
        """End an engine that is not to be trusted, unless a version in service needs it. In the background."""
        if identity.key in self._engines and identity.key not in self._pinned():
            self._in_background(self._stop(identity.key, RETIRE_SECONDS), f"retire {identity.key}")

    def retire_left(self) -> None:
        """End what left the rollback window, beyond the engines that stay warm anyway. In the background."""
        self._in_background(self.make_room(), "retire what left the window")

    async def end_now(self, identity: EngineIdentity) -> None:
        """Kill the engine of this identity, if there is one, without letting its requests end."""
        engine = self._engines.get(identity.key)
        if engine is not None:
            self._drop(engine)
            await asyncio.to_thread(engine.end_now)

    async def make_room(self, num_extra: int = MAX_EXTRA_ENGINES) -> None:
        """Stop the least recently used idle engines beyond `num_extra` that no version in service needs."""
        pinned = self._pinned()
        extra = sorted((k for k in self._engines if k not in pinned), key=lambda k: self._used.get(k, 0))
        for key in extra[: max(len(extra) - num_extra, 0)]:
            engine = self._engines[key]
            is_busy = engine.state in ("new", "starting") or (
                engine.state == "ready" and await engine_http.in_flight(self._session, engine.endpoint)
            )
            if not is_busy:
                await self._stop(key)

    async def close(self, keep_running: bool, drain_seconds: float) -> None:
        """Stop every engine, or leave them to the next host."""
        for task in [*self._background, *self._starts.values()]:
            task.cancel()
        await asyncio.gather(*self._background, *self._starts.values(), return_exceptions=True)
        if (prepared := self._take_prepared()) is not None:
            prepared.end()
        if not keep_running:
            await asyncio.gather(*(engine.stop(drain_seconds) for engine in list(self._engines.values())))
            await asyncio.gather(*self._stops.values())

    def _begin(self, key: str, start: Coroutine[Any, Any, Engine]) -> "asyncio.Task[Engine]":
        task = asyncio.create_task(start, name=f"start {key}")
        self._starts[key] = task
        task.add_done_callback(lambda done: self._forget_start(key, done))
        return task

    async def _start(self, identity: EngineIdentity) -> Engine:
        key = identity.key
        engine = Engine(identity, self._site, self._session)
        self._engines[key] = engine
        try:
            if key in self._stops:
                await asyncio.shield(self._stops[key])  # the one before is still letting its requests end
            if key not in self._pinned():
                await self.make_room()
            engine.cores = self._next_cores()
            with contextlib.ExitStack() as held:
                tree = await asyncio.to_thread(held.enter_context, self._store.using(identity.artifact))
                await self._start_in_turn(engine, tree)
            await self._warm(engine)
        except MansardError:
            await engine.stop(drain_seconds=0)
            self._drop(engine)
            raise
        seconds = canonical_json({"format": 1, "start_seconds": engine.start_seconds})
        write_atomically(self._seconds_file(key), seconds)
        self._keep(engine)
        return engine

    async def _start_in_turn(self, engine: Engine, tree: Path) -> None:
        """On a GPU one after the other: each measures what the card has free while it starts. Where that is too little,
        what is idle and in nobody's service ends first."""
        is_on_card = self._site.engine.gpu_memory_gib is not None
        async with self._card if is_on_card else contextlib.nullcontext():

            def ports() -> list[int]:
                return [e.port for e in self._engines.values() if e is not engine]

            prepared = None if slots_of(tree) else self._take_prepared()
            try:
                await engine.start(tree, ports, prepared)
            except StageFailed:
                if not is_on_card or engine.pid:
                    raise
                await self.make_room(0)
                await engine.start(tree, ports, prepared)
            finally:
                if prepared is not None and not engine.pid:  # refused before anything was started
                    await self._give_back(prepared)

    async def _give_back(self, prepared: PreparedEngine) -> None:
        """The next engine may come of it; one at a time."""
        if self._prepared is None:
            self._prepared = prepared
        else:
            await asyncio.to_thread(prepared.end)

    def _take_prepared(self) -> PreparedEngine | None:
        prepared, self._prepared = self._prepared, None
        return prepared

    async def _expire(self, prepared: PreparedEngine) -> None:
        await asyncio.sleep(PREPARED_SECONDS)
        if self._prepared is prepared:
            self._prepared = None
            await asyncio.to_thread(prepared.end)

    def _seconds_file(self, key: str) -> Path:
        return self._site.run / "engine-starts" / f"{key}.json"

    async def _warm(self, engine: Engine) -> None:
        """One real request: vLLM may list a model that it cannot run."""
        timeout_seconds = self._site.engine.start_timeout_seconds
        try:
            await engine_http.complete_one_token(
                self._session, engine.endpoint, engine.identity.served_name, timeout_seconds
            )
        except MansardError as error:
            words = last_words(engine.log)
            raise StageFailed(f"{error}; the engine's last lines: {words}; its log: {engine.log}") from error

    async def _resume(self, engine: Engine) -> Engine:
        try:
            await engine.resume()
        except MansardError:
            self._drop(engine)
            self._on_end(engine)
            raise
        self._keep(engine)
        return engine

    def _keep(self, engine: Engine) -> None:
        self._in_background(self._watch(engine), f"watch {engine.identity.key}")

    def _in_background(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _watch(self, engine: Engine) -> None:
        if await engine.wait_for_end():
            self._drop(engine)
            self._on_end(engine)

    async def _stop(self, key: str, drain_seconds: float = DRAIN_SECONDS) -> None:
        if key not in self._stops:
            task = asyncio.create_task(self._engines[key].stop(drain_seconds), name=f"stop {key}")
            self._stops[key] = task
            task.add_done_callback(lambda _: self._stops.pop(key, None))
            self._drop(self._engines[key])
        await asyncio.shield(self._stops[key])

    def _drop(self, engine: Engine) -> None:
        if self._engines.get(engine.identity.key) is engine:
            del self._engines[engine.identity.key]

    def _next_cores(self) -> str:
        """The core set that the fewest engines run on, the first of them."""
        sets = self._site.engine.cores
        if not sets:
            return ""
        taken = [engine.cores for engine in self._engines.values()]
        return min(sets, key=taken.count)

    def _forget_start(self, key: str, done: "asyncio.Task[Engine]") -> None:
        if self._starts.get(key) is done:
            del self._starts[key]
        if not done.cancelled():
            done.exception()  # read once, so that a start nobody waited for is no warning


async def _end(process: ProcessIdentity) -> None:
    """SIGTERM, so that vLLM removes its shared memory, then SIGKILL."""
    send(process, signal.SIGTERM)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(wait_for_end(process), SHUTDOWN_SECONDS)
    send(process, signal.SIGKILL)
