"""One engine: a vLLM process that serves one artifact under one name on a loopback port.

Guarantees: the process has its own group and log file; its pid, start time and port stand in a record on disk before
anything waits for it, so that a restarted host adopts it; `ready` means that /v1/models named the model; after `stop`
no process of the group is left. Does not cover: which engines run (host/engines.py) and traffic (host/traffic.py).
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import aiohttp

from mansard.canonical import canonical_json, write_atomically
from mansard.errors import StageFailed
from mansard.serving.engine import http as engine_http
from mansard.serving.engine.card_memory import engine_memory
from mansard.serving.engine.command import (
    SHUTDOWN_SECONDS,
    EngineIdentity,
    command,
    free_port,
    slot_variables,
    spawn,
    variables,
)
from mansard.serving.engine.log import last_words, tail
from mansard.serving.engine.prepared import PreparedEngine
from mansard.serving.process import (
    ProcessIdentity,
    identify,
    kill_group,
    members_named,
    send,
    wait_for_end,
    wait_for_first_end,
)
from mansard.site import Site
from mansard.specs.whole import Serve

DRAIN_SECONDS = 120.0
"""How long `stop` waits for an engine's own requests before SIGTERM."""
POLL_SECONDS = 0.25
PORT_ATTEMPTS = 5
RESUME_SECONDS = 120.0
WORKER_PREFIX = "VLLM::"
"""How vLLM names the processes that its server starts (VLLM_PROCESS_NAME_PREFIX): EngineCore, Worker_TP0 and so on."""


class Engine:
    """`state` is one of new, starting, ready, failed, stopping, stopped. `cores` is set before `start`. `branches` are
    the names of those in its slots; `warnings` are by what requests ask it for."""

    def __init__(self, identity: EngineIdentity, site: Site, session: aiohttp.ClientSession) -> None:
        self.identity = identity
        self.cores = ""
        self.state = "new"
        self.port = 0
        self.pid = 0
        self.log = Path()
        self.start_seconds: float | None = None
        self.problem = ""
        self.warnings: dict[str, str] = {}
        self.branches: set[str] = set()
        self._branches_lock = asyncio.Lock()
        self.begun_at = 0.0
        self._site = site
        self._session = session
        self._process: ProcessIdentity | None = None
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def record_file(self) -> Path:
        return self._site.run / "engines" / f"{self.identity.key}.json"

    def describe(self) -> dict[str, Any]:
        """What /status and POST /engines say of it."""
        return {
            "key": self.identity.key,
            "artifact": self.identity.artifact,
            "served_name": self.identity.served_name,
            "endpoint": self.endpoint,
            "state": self.state,
            "pid": self.pid,
            "cores": self.cores,
            "start_seconds": self.start_seconds,
            "log": str(self.log),
            "problem": self.problem,
            "branches": sorted(self.branches),
        }

    async def start(
        self, tree: Path, taken_ports: Callable[[], Collection[int]], prepared: PreparedEngine | None = None
    ) -> None:
        """Start vLLM on `tree` and wait until it serves; MansardError with the log's last lines when it does not, or
        before anything is started where the card has too little memory.

        `taken_ports` is asked when a port is chosen: engines that start together must see each other's, because vLLM
        binds early and listens late, and until then a second bind of the same port succeeds. A `prepared` process
        becomes the engine if it can; where that one does not come up, the next is started plainly.
        """
        lost: set[int] = set()
        memory = await asyncio.to_thread(engine_memory, self._site, self.identity.serve.tensor_parallel)
        self.begun_at = time.time()
        deadline = self.begun_at + self._site.engine.start_timeout_seconds
        for _ in range(PORT_ATTEMPTS):
            self.port = free_port(self._site.ports.engines_from, lost.union(taken_ports()))
            was_prepared, prepared = self._spawn(tree, memory, prepared), None
            if await self._is_ready_by(deadline):
                return
            lost_port = "address already in use" in tail(self.log, 40).lower()
            if not (lost_port or was_prepared) or self.state != "failed" or time.time() > deadline:
                break
            lost.add(self.port)  # somebody took it between our look and vLLM's bind
        raise StageFailed(self.problem)

    @staticmethod
    def adopt(record_file: Path, site: Site, session: aiohttp.ClientSession) -> "Engine | None":
        """The engine of a record if its very process still runs; ready or starting, as recorded. Else None.

        Call `resume` on it next.
        """
        try:
            record = json.loads(record_file.read_text())
            process = ProcessIdentity(**record["process"])
            identity = EngineIdentity(record["artifact"], record["served_name"], Serve(**record["serve"]))
            engine = Engine(identity, site, session)
            engine.cores, engine.port, engine.log = record["cores"], record["port"], Path(record["log"])
            engine.begun_at = record["begun_at"]
            engine.state, engine.start_seconds = record["state"], record["start_seconds"]
            engine.branches = set(record.get("branches", ()))
        except (OSError, ValueError, KeyError, TypeError):
            return None  # half a record or an older form: the orphan search finds its process
        if engine.state not in ("starting", "ready") or not process.is_running():
            return None
        engine._process, engine.pid = process, process.pid
        return engine

    async def resume(self) -> None:
        """See that an adopted engine answers, or wait until it does; MansardError when it does not.

        One that was ready counts as ready meanwhile: users of the host before this one are asking it now.
        """
        deadline = time.time() + RESUME_SECONDS
        if self.state == "starting":
            deadline = max(deadline, self.begun_at + self._site.engine.start_timeout_seconds)
        if not await self._is_ready_by(deadline):
            raise StageFailed(self.problem)

    async def hold_branch(self, name: str, folder: Path) -> None:
        """Have the branch of `folder` in this engine under `name`; MansardError with the engine's reason."""
        async with self._branches_lock:
            if name not in self.branches:
                seconds = self._site.engine.start_timeout_seconds
                await engine_http.load_branch(self._session, self.endpoint, name, folder, seconds)
                self.branches.add(name)
                self._write_record()

    async def drop_branch(self, name: str) -> None:
        """No request names it any more."""
        async with self._branches_lock:
            if name in self.branches:
                self.branches.discard(name)
                self._write_record()
                await engine_http.unload_branch(self._session, self.endpoint, name, RESUME_SECONDS)

    async def wait_for_end(self) -> str:
        """Wait until the process, or a worker that it computes with, ends; the reason when nobody asked it to, else an
        empty string. vLLM itself notices a dead worker (no memory, a faulty card) only every five seconds."""
        assert self._process is not None, "watch an engine after it was started"
        await wait_for_first_end([self._process, *members_named(self._process, WORKER_PREFIX)])
        is_running = self._process.is_running()
        if not is_running:
            self._reap()
        if self.state not in ("ready", "starting"):
            return ""
        part = "worker process of the engine" if is_running else "engine"
        self._fail(f"{part} of {self.identity.served_name} ({self.identity.artifact[:12]}) ended")
        return self.problem

    async def stop(self, drain_seconds: float = DRAIN_SECONDS) -> None:
        """Let its requests end, then SIGTERM, then SIGKILL to the whole group."""
        was_ready = self.state == "ready"
        self.state = "stopping"
        if self._process is not None:
            if was_ready:
                await self._drain(drain_seconds)
            send(self._process, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):  # the group is killed next
                await asyncio.wait_for(wait_for_end(self._process), SHUTDOWN_SECONDS + 15)
            self._clear()
        self.record_file.unlink(missing_ok=True)
        self.state = "stopped"

    def end_now(self) -> None:
        """SIGKILL to the group. What it was answering breaks off, which the router tells the clients."""
        self.state = "stopping"
        self._clear()
        self.record_file.unlink(missing_ok=True)
        self.state = "stopped"

    def _spawn(self, tree: Path, memory_arguments: Sequence[str], prepared: PreparedEngine | None) -> bool:
        """Whether it is the prepared process."""
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        self.log = self._site.logs / "engines" / f"{stamp}-{self.identity.key}-{self.port}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.record_file.parent.mkdir(parents=True, exist_ok=True)
        words = command(self.identity, tree, self.port, self._site, memory_arguments)
        environment = {**os.environ, **variables(self._site, self.cores), **slot_variables(tree)}
        child = None if prepared is None else prepared.become(words, self.log, environment)
        if child is None:
            with self.log.open("ab") as log_file:
                self._child = spawn(words, log_file, environment, self.record_file.parent)
        else:
            self._child = child
        self.pid, self.state, self.problem = self._child.pid, "starting", ""
        self._process = identify(self.pid)
        self._write_record()
        return child is not None

    async def _is_ready_by(self, deadline: float) -> bool:
        """Wait for /v1/models; on death or deadline the process is cleared away and `problem` says why."""
        while self._process is not None and self._process.is_running():
            names = await engine_http.names(self._session, self.endpoint)
            if self.identity.served_name in names:
                if not self._process.is_running():
                    break  # somebody else answered on this port
                if self.state not in ("starting", "ready"):
                    return False  # stopped meanwhile
                self.branches = names - {self.identity.served_name}
                if self.state == "starting":
                    self.start_seconds = round(time.time() - self.begun_at, 1)
                    self.state = "ready"
                    self._write_record()
                return True
            if time.time() > deadline:
                waited = time.time() - self.begun_at
                self._give_up(f"did not answer /v1/models within {waited:.0f} s (engine.start_timeout_seconds)")
                return False
            await asyncio.sleep(POLL_SECONDS)
        self._give_up("did not come up")
        return False

    def _give_up(self, what: str) -> None:
        self._clear()
        code = "" if self._child is None else f", exit status {self._child.poll()}"
        self._fail(f"engine of {self.identity.served_name} ({self.identity.artifact[:12]}) {what}{code}")

    def _fail(self, what: str) -> None:
        self.state = "failed"
        self.problem = f"{what}; its last lines: {last_words(self.log)}; its log: {self.log}"
        self._clear()
        self.record_file.unlink(missing_ok=True)

    def _clear(self) -> None:
        if self._process is not None:
            kill_group(self._process)
        self._reap()

    def _reap(self) -> None:
        if self._child is not None:
            self._child.wait()

    async def _drain(self, seconds: float) -> None:
        """Wait until the engine says twice running that nothing is in flight, or the time is over, or it is dead."""
        assert self._process is not None
        deadline = time.monotonic() + seconds
        quiet = 0
        while quiet < 2 and time.monotonic() < deadline and self._process.is_running():
            quiet = quiet + 1 if await engine_http.in_flight(self._session, self.endpoint) == 0 else 0
            await asyncio.sleep(POLL_SECONDS)

    def _write_record(self) -> None:
        if self._process is None:
            return  # it has ended already
        record = {
            "format": 1,
            "artifact": self.identity.artifact,
            "served_name": self.identity.served_name,
            "serve": self.identity.serve.model_dump(mode="json"),
            "process": asdict(self._process),
            "port": self.port,
            "cores": self.cores,
            "state": self.state,
            "begun_at": self.begun_at,
            "start_seconds": self.start_seconds,
            "branches": sorted(self.branches),
            "log": str(self.log),
        }
        write_atomically(self.record_file, canonical_json(record))
