"""HAProxy as the data plane: `python -m mansard.serving.haproxy.driver --site FILE`.

To the host it is a router worker with index 0: it follows the same split file by the same rules (a lower term is
ignored, a canary whose lease ran out gets nothing), and answers /observations, /records and /metrics on the same
admin socket. A term counts as taken when HAProxy was seen to carry it. Guarantees: HAProxy outlives this process, which
finds it again by its runtime socket, and meanwhile takes a canary to 0 % by itself; it is started anew when it died.
Per sticky key it tells what the router tells: from HAProxy's log and, of what is in flight, from its table (all of a
key's as old as the newest). Not covered: API keys, rates, error events in broken streams (HAProxy cuts them off).
"""

import argparse
import asyncio
import contextlib
import functools
import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from aiohttp import web

from mansard.canonical import write_atomically
from mansard.errors import BadInput, MansardError
from mansard.serving.folder_watch import FolderWatch
from mansard.serving.haproxy.config import config_text, log_socket, routes_file, runtime_socket, salt_file
from mansard.serving.haproxy.log import take_line
from mansard.serving.haproxy.runtime import HaproxyFailed, InFlight, Runtime
from mansard.serving.process import identify
from mansard.serving.router.admin import RouterAdmin
from mansard.serving.router.http import HardenedServer
from mansard.serving.router.metrics import Observations
from mansard.serving.router.sockets import AdminSocket
from mansard.serving.router.split_watch import LEASE_SECONDS, SplitWatch
from mansard.serving.split import ModelSplit, Split
from mansard.site import Site, load_site

LOOK_SECONDS = 0.25
START_SECONDS = 10.0
DRAIN_SECONDS = 120.0

log = logging.getLogger("mansard.haproxy")


class Driver:
    """Keeps HAProxy and the split together. `split` is what HAProxy was seen to carry."""

    def __init__(
        self, site: Site, program: str, watch: SplitWatch, observations: Observations, lease_seconds: float
    ) -> None:
        self.split = Split()
        self.problem: str | None = None
        self.runtime = Runtime(runtime_socket(site), routes_file(site), salt_file(site))
        self._site = site
        self._program = program
        self._watch = watch
        self._observations = observations
        self._carried: ModelSplit | None = None
        self._stable_since = 0.0
        self._lease_seconds = max(lease_seconds, 4 * LOOK_SECONDS)
        self._pid = 0

    def has_lease(self, model: str) -> bool:
        return self._watch.has_lease(model)

    async def start(self) -> None:
        """Find HAProxy running, or start it and wait until it answers."""
        with contextlib.suppress(HaproxyFailed):
            self._pid = self.runtime.pid()
            return
        config = self._site.run / "haproxy.cfg"
        write_atomically(routes_file(self._site), b"canary 0\nlimit 0\nuntil 0\n", 0o600)
        write_atomically(salt_file(self._site), b"salt /\n", 0o600)
        write_atomically(config, config_text(self._site, self._site.ports.router).encode())
        process = await asyncio.create_subprocess_exec(
            *(self._program, "-db", "-f", str(config)), stdin=asyncio.subprocess.DEVNULL, start_new_session=True
        )
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                self._pid = self.runtime.pid()
                break
            except HaproxyFailed:
                if process.returncode is not None:
                    raise BadInput(f"{config}: HAProxy did not start; its own lines above say why") from None
                if time.monotonic() > end:
                    raise
            await asyncio.sleep(0.02)
        self._carried = None

    def look(self) -> None:
        """Carry the newest split. What goes wrong is `problem` until the next look mends it."""
        self._watch.poll()
        known = self._watch.split
        self.problem = self._watch.problem
        if not known.models:
            return
        name = next(iter(known.models))
        serving = self._watch.serving(name)
        if serving == self._carried and known.term == self.split.term:
            return
        try:
            self.runtime.renew(self._lease_seconds)
            self.runtime.carry(serving)
        except HaproxyFailed as error:
            self.problem = str(error)
            log.warning("%s", error)
            return
        if known.term != self.split.term:
            log.info("term %s", known.term)
        if self._carried is None or serving.stable != self._carried.stable:
            self._stable_since = self._observations.clock()
        self.split, self._carried = known, serving

    async def see_in_flight(self) -> None:
        """What is in flight joins the observations, but for what an earlier stable has still.

        In a thread, so that the log is read on meanwhile.
        """
        found: list[InFlight] = []
        with contextlib.suppress(HaproxyFailed):  # then nothing is
            found = await asyncio.to_thread(self.runtime.in_flight)
        model = self._carried
        if model is None:
            return
        now, told = self._observations.clock(), []
        for one in found:
            start = now - one.age_seconds
            if one.canary or start > self._stable_since:
                told += [(one.canary or model.stable, one.key, start, one.has_begun, one.tenant)] * one.number
        self._observations.set_in_flight(model.name, told)

    async def keep(self) -> None:
        """Look all the time; start HAProxy again when it died."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await asyncio.to_thread(self.runtime.renew, self._lease_seconds)
            except HaproxyFailed as error:
                log.warning("%s; it is started again", error)
                await self.start()
            self.look()

    async def end(self, deadline_seconds: float) -> None:
        """HAProxy stops accepting, finishes what it has, and ends."""
        for number in (signal.SIGUSR1, signal.SIGTERM):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, number)
            end = time.monotonic() + deadline_seconds
            while identify(self._pid) is not None and time.monotonic() < end:
                await asyncio.sleep(0.05)
            deadline_seconds = START_SECONDS

    def take_line(self, data: bytes) -> None:
        """One line of HAProxy's log; those about servers are not about requests."""
        if not data.startswith(b"{"):
            return
        try:
            take_line(self._observations, next(iter(self._watch.split.models.values())), data)
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            log.warning("a line of HAProxy's log is not understood: %r: %r", error, data[:300])


async def _read_lines(driver: Driver, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """HAProxy's log over one connection: each line behind its length (octet counting, RFC 6587)."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError), contextlib.closing(writer):
        while True:
            length = await reader.readuntil(b" ")
            driver.take_line(await reader.readexactly(int(length)))


async def serve(site: Site, lease_seconds: float, drain_seconds: float) -> None:
    """Run until a signal. Raises BadInput without HAProxy, Conflict when a router worker has index 0."""
    program = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
    if program is None:
        raise BadInput(f"{site.path}: router.plane haproxy: no program haproxy; on Debian: apt-get install haproxy")
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    watch = SplitWatch(site.split_file, lease_seconds, time.monotonic)
    observations = Observations(time.monotonic)
    driver = Driver(site, program, watch, observations, lease_seconds)
    admin = RouterAdmin(site, 0, driver, observations)

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        await driver.see_in_flight()
        return await admin.answer(request)

    admin_server = HardenedServer(answer)
    with AdminSocket(site.run, 0) as listener, FolderWatch(site.split_file.parent) as folder:
        lines_at = log_socket(site)
        lines_at.unlink(missing_ok=True)
        lines = await asyncio.start_unix_server(functools.partial(_read_lines, driver), lines_at)
        await driver.start()
        driver.look()
        loop.add_reader(folder.fileno(), _take_news, folder, driver)
        server = await loop.create_unix_server(admin_server, sock=listener)
        print(json.dumps({"ready": True, "port": site.ports.router, "pid": os.getpid()}), flush=True)
        keeping, stop = loop.create_task(driver.keep()), loop.create_task(stopping.wait())
        await asyncio.wait({keeping, stop}, return_when=asyncio.FIRST_COMPLETED)
        if keeping.done():
            keeping.result()
        keeping.cancel()
        loop.remove_reader(folder.fileno())
        admin.is_draining = True
        await driver.end(drain_seconds)
        lines.close()
        server.close()
        await admin_server.shutdown(1.0)


def _take_news(folder: FolderWatch, driver: Driver) -> None:
    folder.clear()
    driver.look()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Ends with the exit code of the error."""
    parser = argparse.ArgumentParser(prog="python -m mansard.serving.haproxy.driver", description="Drives HAProxy.")
    parser.add_argument("--site", type=Path, required=True)
    parser.add_argument("--lease-seconds", type=float, default=LEASE_SECONDS)
    parser.add_argument("--drain-seconds", type=float, default=DRAIN_SECONDS)
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    try:
        asyncio.run(serve(load_site(given.site), given.lease_seconds, given.drain_seconds))
    except MansardError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
