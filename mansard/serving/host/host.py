"""`python -m mansard.serving.host.host --site FILE`: the process that owns engines, journal connection and rollouts.

Guarantees: one host per site (a lock); /alive answers at once, /status as soon as the journal does, everything else
after engines of a host before this one were adopted; journal and store, which may be on other machines and give no
answer, hold up nobody but who needs them; a rollout that the host before left open is walked on. SIGTERM and SIGINT end
rollouts, engines and host; SIGHUP ends the host and leaves engines and rollouts to the next one.
Nothing here is needed for users' requests: the router reads the split.
"""

import argparse
import asyncio
import contextlib
import fcntl
import functools
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from mansard.errors import BadInput, JournalDamaged, JournalDown, MansardError
from mansard.private_files import use_private_umask
from mansard.release import emergency
from mansard.release.approval import check_evidence
from mansard.release.journal import Journal
from mansard.release.permission import check_approval, guard_of
from mansard.serving.engine.engine import Engine
from mansard.serving.host.api import make_app
from mansard.serving.host.engines import Engines
from mansard.serving.host.fingerprint import Fingerprints
from mansard.serving.host.journal_calls import JournalCalls
from mansard.serving.host.journal_view import JournalView
from mansard.serving.host.journal_watch import JournalWatch
from mansard.serving.host.outages import Outages
from mansard.serving.host.residents import Residents
from mansard.serving.host.rollback import Rollback
from mansard.serving.host.rollouts import Rollouts
from mansard.serving.host.traffic import Traffic
from mansard.serving.log_rotation import keep_rotating
from mansard.site import Site, find_site, load_site
from mansard.store.store import Store

DOWN_DRAIN_SECONDS = 20.0
"""At `mansard down` the router has ended before, so little is in flight."""
STATUS_SECONDS = 2.0
"""So long /status waits for a journal on another machine."""
UNIX_PATH_BYTES = 107

log = logging.getLogger(__name__)


class Host:
    """The parts, put together."""

    def __init__(self, site: Site, journal: JournalCalls, session: aiohttp.ClientSession) -> None:
        self.site = site
        self.journal = journal
        self.store = Store.of(site)

        def name_of(model: str, version: int) -> str:
            return self.residents.name(model, version)

        self.traffic = Traffic(site, name_of)
        fingerprints = Fingerprints(journal, self.store, session, name_of)
        self.residents = Residents(site, journal, self.store, self.traffic, fingerprints.warn)
        self.engines = Engines(site, self.store, session, self.residents.pinned, self._engine_ended)
        self.residents.engines = self.engines
        tools = (self.traffic, self.residents, fingerprints.find_change)
        self.outages = self.residents.outages = Outages(site, journal, *tools)
        self.rollouts = Rollouts(
            site,
            journal,
            self.store,
            self.traffic,
            self.residents,
            self.outages,
            self._check_approval,
            functools.partial(check_evidence, self.store),
            fingerprints.find_change,
            session,
        )
        self.rollback = Rollback(site, journal, self.traffic, self.residents, self.rollouts, session)
        self._begun_at = time.time()
        self._is_open = asyncio.Event()

    async def wait_until_open(self) -> None:
        await self._is_open.wait()

    async def open(self) -> None:
        """Adopt engines, bring the split in line with the journal, walk on with rollouts that a dead host left open."""
        await self.journal.call(lambda journal: emergency.import_waiting(self.site, journal))
        for engine in self.engines.adopt():
            log.info("adopted engine %s, process %d at %s", engine.identity.key, engine.pid, engine.endpoint)
        self.outages.lost = self.engines.lost
        for model in self.site.models:
            try:
                await self.residents.look(model)
            except (JournalDown, JournalDamaged):
                raise
            except (MansardError, OSError) as error:  # a store that is silent; the next look tries again
                log.error("%s: %s", model, error)
            self.rollouts.resume(model)
        self._is_open.set()

    def alive(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "state": "ready" if self._is_open.is_set() else "starting",
            "uptime_seconds": round(time.time() - self._begun_at, 1),
        }

    async def status(self) -> dict[str, Any]:
        """JournalDown where a journal on another machine has not answered in STATUS_SECONDS."""

        def read(journal: Journal) -> tuple[int, int, dict[str, JournalView]]:
            tip = journal.tip()
            views = {model: self.residents.view(journal, model) for model in self.site.models}
            return journal.term(), 0 if tip is None else tip.sequence, views

        term, sequence, views = await self.journal.call(read, STATUS_SECONDS)
        self.residents.views.update(views)
        return {
            **self.alive(),
            "term": term,
            "journal_sequence": sequence,
            "models": {model: self._model_status(model) for model in self.site.models},
            "engines": self.engines.describe(),
        }

    def _model_status(self, model: str) -> dict[str, Any]:
        pointers = self.residents.views[model].pointers
        versions = {}
        for version in self.residents.versions(model):
            place = self.residents.place(model, version)
            engine = self.engines.find(place.engine)
            versions[str(version)] = {
                "state": "cold" if engine is None else engine.state,
                "endpoint": self.residents.endpoint(model, version),
                "start_seconds": self.engines.last_start_seconds(place.engine),
                "warning": "" if engine is None else engine.warnings.get(place.name, ""),
            }
        return {
            "stable": pointers.stable,
            "canary": pointers.canary,
            "previous": pointers.previous,
            "term": pointers.term,
            "versions": versions,
            "rollout": self.rollouts.describe(model, self.residents.views[model].moves),
            "outage": self.outages.describe(model),
        }

    def _check_approval(self, journal: Journal, model: str, version: int) -> None:
        """The site is read again: its people may have changed since the host started."""
        check_approval(load_site(self.site.path), journal, model, version)

    def _engine_ended(self, engine: Engine) -> None:
        self.outages.engine_ended(engine)
        log.error("%s", engine.problem)
        self.rollouts.engine_ended(engine)
        self.residents.wake()


async def serve(site: Site) -> None:
    """Run until a signal."""
    stop = asyncio.Event()
    keep_engines = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, _set_both, keep_engines, stop)
    opened = await asyncio.to_thread(Journal.open, site.journal, guard=guard_of(site.path))
    with opened, JournalWatch(site):
        async with aiohttp.ClientSession() as session, JournalCalls.of(opened, site) as journal:
            host = Host(site, journal, session)
            async with _listening(host, site.host_socket):
                await host.open()
                log.info("host of %s listens on %s", site.path, site.host_socket)
                try:
                    await _run_until(stop, host)
                except BaseException:
                    keep_engines.set()  # our own fault: users keep what serves them
                    raise
                finally:
                    if not keep_engines.is_set():
                        await host.rollouts.abort_all("aborted: host stopped")
                    await host.rollouts.close()
                    await host.outages.close()
                    await host.engines.close(keep_engines.is_set(), DOWN_DRAIN_SECONDS)


def _set_both(first: asyncio.Event, second: asyncio.Event) -> None:
    first.set()
    second.set()


async def _run_until(stop: asyncio.Event, host: Host) -> None:
    """Keep the residents until `stop` is set, or raise what ended that."""
    async with asyncio.TaskGroup() as group:
        keepers = [
            group.create_task(host.residents.run(), name="residents"),
            group.create_task(keep_rotating(host.site.logs), name="logs"),
        ]
        await stop.wait()
        for keeper in keepers:
            keeper.cancel()


@contextlib.asynccontextmanager
async def _listening(host: Host, socket: Path) -> AsyncIterator[None]:
    if len(os.fsencode(socket)) > UNIX_PATH_BYTES:
        raise BadInput(f"{socket}: a socket's path has at most {UNIX_PATH_BYTES} bytes; choose a shorter home")
    socket.unlink(missing_ok=True)
    # Requests in flight end with the host; their clients read from the journal what became of them.
    runner = web.AppRunner(make_app(host), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    old_mask = os.umask(0o177)
    try:
        await web.UnixSite(runner, str(socket)).start()
    finally:
        os.umask(old_mask)
    try:
        yield
    finally:
        await runner.cleanup()
        socket.unlink(missing_ok=True)


@contextlib.contextmanager
def _only_host(site: Site) -> Iterator[None]:
    """Hold the site's host lock; it ends with the process, however it ends."""
    site.run.mkdir(parents=True, exist_ok=True)
    with (site.run / "host.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise MansardError(
                f"a host of {site.home} runs already, process {lock.read().strip() or 'unknown'}; "
                "one host per site: look at mansard status"
            ) from error
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m mansard.serving.host.host", description=__doc__)
    parser.add_argument("--site", help="the site file")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    use_private_umask()
    try:
        site = load_site(find_site(given.site))
        with _only_host(site):
            asyncio.run(serve(site))
    except MansardError as error:
        print(f"host: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
