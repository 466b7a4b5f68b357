"""The router worker process: `python -m mansard.serving.router.worker --site FILE --index 0`.

Answers on the public socket that it inherits (`--listen-fd`; alone it opens its own) and on the Unix socket
run/router-INDEX.sock, prints one JSON line when it is ready, follows the split file, and on SIGTERM or SIGINT drains:
stops accepting, finishes what it accepted (up to a deadline) and exits 0. Not covered: starting it again when it died
(supervisor.py).
"""

import argparse
import asyncio
import gc
import json
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop
from aiohttp import web

from mansard.errors import BadInput, MansardError
from mansard.serving.folder_watch import FolderWatch
from mansard.serving.router.access_log import FLUSH_SECONDS, AccessLog
from mansard.serving.router.admin import RouterAdmin
from mansard.serving.router.forward import Forwarder
from mansard.serving.router.http import IDLE_SECONDS, MAX_CONNECTIONS, WRITE_SECONDS, HardenedServer
from mansard.serving.router.keys import KeyFile
from mansard.serving.router.metrics import Observations
from mansard.serving.router.pool import EnginePool
from mansard.serving.router.public import Guards, Limits, Router
from mansard.serving.router.rates import Rates, shared_memory
from mansard.serving.router.sockets import BACKLOG, AdminSocket, listen
from mansard.serving.router.split_watch import LEASE_SECONDS, SplitWatch
from mansard.site import Site, load_site

POLL_SECONDS = 1.0
"""The folder's watch says at once when the split is replaced; this is for what it cannot see, and for the API keys."""
DRAIN_GRACE_SECONDS = 0.5
"""For requests that are on their way on accepted connections when draining starts."""
DRAIN_LOOK_SECONDS = 0.02
DRAIN_SECONDS = 120.0
SPARE_DESCRIPTORS = 256
"""Beside clients and engines: the split, keys, logs, admin sockets, those that are told that nothing is free."""

log = logging.getLogger("mansard.router")


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line may set; the rest is the site's. Descriptors are None in a worker that runs alone."""

    index: int
    lease_seconds: float
    drain_seconds: float
    idle_seconds: float
    write_seconds: float
    first_byte_seconds: float | None
    silent_seconds: float | None
    max_connections: int
    limits: Limits
    listen_fd: int | None = None
    rates_fd: int | None = None


async def serve(site: Site, options: Options) -> None:
    """Run one worker until it is told to stop. Raises BadInput for a taken port, Conflict for a taken index."""
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    keys, operators = (None if path is None else KeyFile(path) for path in (site.api_keys, site.operator_tokens))
    key_files = [file for file in (keys, operators) if file is not None]
    for file in key_files:
        file.read()
    rates = Rates(shared_memory() if options.rates_fd is None else options.rates_fd)
    guards = Guards(keys, operators, rates, site.router.show_version == "always")
    watch = SplitWatch(site.split_file, options.lease_seconds, time.monotonic)
    router_site = site.router
    pool = EnginePool(options.first_byte_seconds or router_site.first_byte_seconds)
    observations = Observations(time.monotonic)
    admin = RouterAdmin(site, options.index, watch, observations)
    access_log = AccessLog(site.logs / f"router-{options.index}-access.jsonl")
    forwarder = Forwarder(watch, pool, observations, options.silent_seconds or router_site.silent_seconds)
    router = Router(watch, forwarder, observations, guards, admin, access_log, options.limits)
    max_connections = min(options.max_connections, num_connections(options.limits.running))
    public = HardenedServer(router.public, options.idle_seconds, options.write_seconds, max_connections)
    admin_server = HardenedServer(admin.answer)
    inherited = options.listen_fd
    with (
        listen(site.ports.router) if inherited is None else socket.socket(fileno=inherited) as listener,
        AdminSocket(site.run, options.index) as admin_listener,
        FolderWatch(site.split_file.parent) as folder,
    ):
        loop.add_reader(folder.fileno(), _take_news, folder, watch, pool)
        poll(watch, pool)
        listener.setblocking(False)
        servers = [
            await loop.create_server(public, sock=listener, backlog=BACKLOG),
            await loop.create_unix_server(admin_server, sock=admin_listener),
        ]
        watching = loop.create_task(_watch(watch, pool, key_files, access_log))
        gc.collect()
        gc.freeze()  # what the imports made stays for good; looking through it (10 ms) would hold up streams
        ready = {"ready": True, "port": listener.getsockname()[1], "pid": os.getpid(), "term": watch.split.term}
        print(json.dumps(ready), flush=True)
        stop_waiting = loop.create_task(stopping.wait())
        await asyncio.wait({watching, stop_waiting}, return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            watching.result()
        servers[0].close()
        await drain(admin, public, options.drain_seconds)
        watching.cancel()
        access_log.flush()
        loop.remove_reader(folder.fileno())
        servers[1].close()
        await admin_server.shutdown(1.0)


def poll(watch: SplitWatch, pool: EnginePool) -> None:
    """Take a new split, and close idle connections to engines that left it."""
    problem, term = watch.problem, watch.split.term
    if watch.poll():
        pool.keep_only({v.endpoint for m in watch.split.models.values() for v in m.versions.values() if v.endpoint})
        if watch.split.term != term:
            log.info("term %s", watch.split.term)
    if watch.problem is not None and watch.problem != problem:
        log.warning("%s", watch.problem)


def _take_news(folder: FolderWatch, watch: SplitWatch, pool: EnginePool) -> None:
    folder.clear()
    poll(watch, pool)


async def _watch(watch: SplitWatch, pool: EnginePool, key_files: list[KeyFile], access_log: AccessLog) -> None:
    looked, loop = 0.0, asyncio.get_running_loop()
    while True:
        await asyncio.sleep(FLUSH_SECONDS)
        access_log.flush()
        if loop.time() - looked < POLL_SECONDS:
            continue
        looked = loop.time()
        poll(watch, pool)
        for file in key_files:
            try:
                file.read()
            except BadInput as error:  # the keys read before stay in force
                log.warning("%s", error)


async def drain(admin: RouterAdmin, public: web.Server, deadline_seconds: float) -> None:
    """Answer what was accepted. The listener is closed already; streams go on until the deadline."""
    loop = asyncio.get_running_loop()
    admin.is_draining = True
    end = loop.time() + deadline_seconds
    grace = loop.time() + DRAIN_GRACE_SECONDS
    while public.connections and loop.time() < min(grace, end):
        await asyncio.sleep(DRAIN_LOOK_SECONDS)
    public.pre_shutdown()
    while public.connections and loop.time() < end:
        await asyncio.sleep(DRAIN_LOOK_SECONDS)
    if public.connections:
        log.warning("%d connections did not end in %g s and are closed", len(public.connections), deadline_seconds)
    await public.shutdown(0.1)


def _allow_many_files() -> None:
    """Two descriptors a request: the usual soft limit of 1,024 would be reached at the default number in flight."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def num_connections(running: int) -> int:
    """How many clients may be connected: with an engine's connection for each that runs, and some to spare."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = max(soft - SPARE_DESCRIPTORS, 2)
    return free - min(running, free // 2)


def add_worker_arguments(parser: argparse.ArgumentParser) -> None:
    """What a worker and a supervisor, which hands them on, both take."""
    usual = Limits()
    parser.add_argument("--site", type=Path, required=True)
    parser.add_argument("--lease-seconds", type=float, default=LEASE_SECONDS)
    parser.add_argument("--drain-seconds", type=float, default=DRAIN_SECONDS)
    parser.add_argument("--idle-seconds", type=float, default=IDLE_SECONDS, help="for the next request's headers")
    parser.add_argument("--write-seconds", type=float, default=WRITE_SECONDS, help="for a client to take anything")
    parser.add_argument("--first-byte-seconds", type=float, help="instead of the site's")
    parser.add_argument("--silent-seconds", type=float, help="instead of the site's")
    parser.add_argument("--body-seconds", type=float, default=usual.body_seconds)
    parser.add_argument("--body-silent-seconds", type=float, default=usual.body_silent_seconds)
    parser.add_argument("--wait-seconds", type=float, default=usual.wait_seconds)
    parser.add_argument("--max-body-bytes", type=int, default=usual.body_bytes)
    parser.add_argument("--max-held-bytes", type=int, default=usual.held_bytes)
    parser.add_argument("--max-connections", type=int, default=MAX_CONNECTIONS)
    parser.add_argument("--max-running", type=int, default=usual.running)
    parser.add_argument("--max-waiting", type=int, default=usual.waiting)


def _options(given: argparse.Namespace) -> Options:
    limits = Limits(
        body_bytes=given.max_body_bytes,
        body_seconds=given.body_seconds,
        body_silent_seconds=given.body_silent_seconds,
        held_bytes=given.max_held_bytes,
        running=given.max_running,
        waiting=given.max_waiting,
        wait_seconds=given.wait_seconds,
    )
    times = (given.lease_seconds, given.drain_seconds, given.idle_seconds, given.write_seconds)
    engine_times = (given.first_byte_seconds, given.silent_seconds)
    return Options(given.index, *times, *engine_times, given.max_connections, limits, given.listen_fd, given.rates_fd)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Ends with the exit code of the error."""
    parser = argparse.ArgumentParser(prog="python -m mansard.serving.router.worker", description="One router worker.")
    add_worker_arguments(parser)
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--listen-fd", type=int, help="the public socket, inherited")
    parser.add_argument("--rates-fd", type=int, help="memory for the tenants' rates, inherited")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s router-%(name)s %(message)s", stream=sys.stderr)
    _allow_many_files()
    try:
        site = load_site(given.site)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(site, _options(given)))
    except MansardError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
