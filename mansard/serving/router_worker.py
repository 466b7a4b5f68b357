"""The router worker process: `python -m mansard.serving.router_worker --site FILE --index 0`.

Listens on 127.0.0.1:ports.router and on the Unix socket run/router-INDEX.sock, prints one JSON line when it is ready,
follows the split file, and on SIGTERM or SIGINT drains: stops accepting, finishes what it accepted (up to a deadline)
and exits 0. Guarantees: one worker per index (a lock file); a stale socket of a killed worker is replaced.
"""

import argparse
import asyncio
import fcntl
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

from aiohttp import web

from mansard.errors import BadInput, Conflict, MansardError
from mansard.serving.folder_watch import FolderWatch
from mansard.serving.router import Limits, Router
from mansard.serving.router_engine import EnginePool
from mansard.serving.router_http import PublicServer
from mansard.serving.router_metrics import Observations
from mansard.serving.router_policy import ApiKeys
from mansard.serving.router_split import LEASE_SECONDS, SplitWatch
from mansard.site import Site, load_site

POLL_SECONDS = 1.0
"""The folder's watch says at once when the split is replaced; this is for what it cannot see, and for the API keys."""
DRAIN_GRACE_SECONDS = 0.5
"""For requests that are on their way on accepted connections when draining starts."""
DRAIN_LOOK_SECONDS = 0.02
DRAIN_SECONDS = 120.0
BACKLOG = 1024

log = logging.getLogger("mansard.router")


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line may set; the rest is the site's."""

    index: int
    lease_seconds: float
    drain_seconds: float
    limits: Limits


async def serve(site: Site, options: Options) -> None:
    """Run one worker until it is told to stop. Raises BadInput for a taken port, Conflict for a taken index."""
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    keys = None if site.api_keys is None else ApiKeys(site.api_keys)
    if keys is not None:
        keys.read()
    watch = SplitWatch(site.split_file, options.lease_seconds, time.monotonic)
    pool, observations = EnginePool(), Observations(time.monotonic)
    router = Router(watch, pool, observations, keys, options.limits)
    public, admin = PublicServer(router.public), web.Server(router.admin, access_log=None)
    with (
        _listen(site.ports.router) as listener,
        _AdminSocket(site.run, options.index) as admin_listener,
        FolderWatch(site.split_file.parent) as folder,
    ):
        loop.add_reader(folder.fileno(), _take_news, folder, watch, pool)
        poll(watch, pool)
        servers = [
            await loop.create_server(public, sock=listener, backlog=BACKLOG),
            await loop.create_unix_server(admin, sock=admin_listener),
        ]
        watching = loop.create_task(_watch(watch, pool, keys))
        gc.collect()
        gc.freeze()  # what the imports made stays for good; looking through it (10 ms) would hold up streams
        ready = {"ready": True, "port": listener.getsockname()[1], "pid": os.getpid(), "term": watch.split.term}
        print(json.dumps(ready), flush=True)
        stop_waiting = loop.create_task(stopping.wait())
        await asyncio.wait({watching, stop_waiting}, return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            watching.result()
        servers[0].close()
        await drain(router, public, options.drain_seconds)
        watching.cancel()
        loop.remove_reader(folder.fileno())
        servers[1].close()
        await admin.shutdown(1.0)


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


async def _watch(watch: SplitWatch, pool: EnginePool, keys: ApiKeys | None) -> None:
    while True:
        await asyncio.sleep(POLL_SECONDS)
        poll(watch, pool)
        if keys is not None:
            try:
                keys.read()
            except BadInput as error:  # the keys read before stay in force
                log.warning("%s", error)


async def drain(router: Router, public: web.Server, deadline_seconds: float) -> None:
    """Answer what was accepted. The listener is closed already; streams go on until the deadline."""
    loop = asyncio.get_running_loop()
    router.is_draining = True
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


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        listener.close()
        raise BadInput(f"ports.router {port}: {error.strerror}; name a free port in the site file") from error
    return listener


class _AdminSocket:
    """The bound Unix socket of one worker, mode 600, held under a lock so that two workers never share an index."""

    def __init__(self, run: Path, index: int) -> None:
        self._path = run / f"router-{index}.sock"
        self._lock = -1
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def __enter__(self) -> socket.socket:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(f"{self._path}: another router worker has this index; choose another --index") from error
        beside = self._path.with_suffix(".new")
        beside.unlink(missing_ok=True)
        try:
            self._socket.bind(str(beside))
        except OSError as error:
            raise BadInput(f"{self._path}: {error.strerror or error}; give the site a shorter home") from error
        beside.chmod(0o600)
        beside.replace(self._path)
        return self._socket

    def __exit__(self, *raised: object) -> None:
        self._path.unlink(missing_ok=True)
        self._socket.close()
        os.close(self._lock)


def _allow_many_files() -> None:
    """Two descriptors a request: the usual soft limit of 1,024 would be reached at the default number in flight."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Ends with the exit code of the error."""
    parser = argparse.ArgumentParser(prog="python -m mansard.serving.router_worker", description="One router worker.")
    parser.add_argument("--site", type=Path, required=True)
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--lease-seconds", type=float, default=LEASE_SECONDS)
    parser.add_argument("--drain-seconds", type=float, default=DRAIN_SECONDS)
    parser.add_argument("--max-body-bytes", type=int, default=Limits().body_bytes)
    parser.add_argument("--max-in-flight", type=int, default=Limits().in_flight)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s router-%(name)s %(message)s", stream=sys.stderr)
    limits = Limits(body_bytes=options.max_body_bytes, in_flight=options.max_in_flight)
    _allow_many_files()
    try:
        chosen = Options(options.index, options.lease_seconds, options.drain_seconds, limits)
        asyncio.run(serve(load_site(options.site), chosen))
    except MansardError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
