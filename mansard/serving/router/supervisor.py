"""The router of a site: `python -m mansard.serving.router.supervisor --site FILE` opens the public socket and keeps
`router.workers` workers on it.

Guarantees: a worker that dies is started again, after a pause that grows with each early death; connections that wait
in the socket's queue meanwhile are answered by the others or by its successor. SIGTERM and SIGINT drain all workers and
end with 0. Killed itself, it leaves the workers serving: whoever starts it again has to end them first (`mansard up`
does). Standard output gets one JSON line once every worker is ready.
"""

import argparse
import asyncio
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mansard.errors import MansardError
from mansard.private_files import use_private_umask
from mansard.serving.router.rates import shared_memory
from mansard.serving.router.sockets import listen
from mansard.serving.router.worker import add_worker_arguments
from mansard.site import Site, load_site

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 5.0
GOOD_SECONDS = 30.0
"""A worker that lived so long starts again after the first pause."""
AFTER_DRAIN_SECONDS = 10.0

log = logging.getLogger("mansard.router.supervisor")


class WorkerRefused(MansardError):
    """The first start of a worker failed; its own line has said why."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("a router worker did not start; its own line says why")
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class Inherited:
    """What every worker gets: descriptors and the options it was given."""

    listener: socket.socket
    rates: int
    arguments: tuple[str, ...]

    def command(self, index: int) -> list[str]:
        """The command line of the worker with this index."""
        fds = (f"--listen-fd={self.listener.fileno()}", f"--rates-fd={self.rates}")
        worker = ("-m", "mansard.serving.router.worker", *self.arguments)
        return [sys.executable, *worker, f"--index={index}", *fds]


class Keeper:
    """Keeps one worker running. `process` is the present one."""

    def __init__(self, index: int, inherited: Inherited) -> None:
        self.index = index
        self.is_ready = asyncio.Event()
        self.process: asyncio.subprocess.Process | None = None
        self._inherited = inherited
        self._is_ending = False

    async def run(self) -> None:
        """Until `end`. Raises WorkerRefused when the very first start fails."""
        pause = FIRST_PAUSE_SECONDS
        while not self._is_ending:
            began = time.monotonic()
            code = await self._run_once()
            if self._is_ending:
                return
            if not self.is_ready.is_set():
                raise WorkerRefused(code if code > 0 else 1)
            lived = time.monotonic() - began
            pause = FIRST_PAUSE_SECONDS if lived > GOOD_SECONDS else min(pause * 2, LONGEST_PAUSE_SECONDS)
            log.warning("worker %d ended with %d after %.1f s; again in %.1f s", self.index, code, lived, pause)
            await asyncio.sleep(pause)

    async def _run_once(self) -> int:
        inherited = self._inherited
        try:
            self.process = await asyncio.create_subprocess_exec(
                *inherited.command(self.index),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                pass_fds=(inherited.listener.fileno(), inherited.rates),
            )
        except OSError as error:  # no descriptor, process or memory is free
            log.error("worker %d cannot be started: %s", self.index, error)
            return 1
        if self._is_ending:
            self.process.terminate()
        assert self.process.stdout is not None
        if await self.process.stdout.readline():
            self.is_ready.set()
        return await self.process.wait()

    def end(self, number: signal.Signals) -> None:
        """Send it away and do not start it again."""
        self._is_ending = True
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(number)


async def supervise(site: Site, arguments: tuple[str, ...], drain_seconds: float) -> None:
    """Run until a signal. Raises BadInput for a taken port, WorkerRefused."""
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    with listen(site.ports.router) as listener:
        inherited = Inherited(listener, shared_memory(), arguments)
        keepers = [Keeper(index, inherited) for index in range(site.router.workers)]
        running = [loop.create_task(keeper.run()) for keeper in keepers]
        try:
            await _until_ready_or_over(keepers, running, stopping)
            if not stopping.is_set() and not any(task.done() for task in running):
                ready = {"ready": True, "port": listener.getsockname()[1], "pid": os.getpid()}
                print(json.dumps({**ready, "workers": len(keepers)}), flush=True)
                await _first(*running, loop.create_task(stopping.wait()))
        finally:
            listener.close()  # new connections are refused from here on, once the workers have closed theirs too
            await _end(keepers, running, drain_seconds)
    for task in running:
        task.result()


async def _until_ready_or_over(
    keepers: list[Keeper], running: "list[asyncio.Task[None]]", stopping: asyncio.Event
) -> None:
    async def all_ready() -> None:
        for keeper in keepers:
            await keeper.is_ready.wait()

    loop = asyncio.get_running_loop()
    await _first(*running, loop.create_task(all_ready()), loop.create_task(stopping.wait()))


async def _first(*tasks: "asyncio.Task[Any]") -> None:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


async def _end(keepers: list[Keeper], running: "list[asyncio.Task[None]]", drain_seconds: float) -> None:
    for keeper in keepers:
        keeper.end(signal.SIGTERM)
    _, late = await asyncio.wait(running, timeout=drain_seconds + AFTER_DRAIN_SECONDS)
    for keeper in keepers:
        keeper.end(signal.SIGKILL)
    if late:
        await asyncio.wait(late)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Ends with the exit code of the error."""
    parser = argparse.ArgumentParser(
        prog="python -m mansard.serving.router.supervisor", description="The router workers of a site."
    )
    add_worker_arguments(parser)
    words = tuple(sys.argv[1:] if arguments is None else arguments)
    given = parser.parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    use_private_umask()
    try:
        asyncio.run(supervise(load_site(given.site), words, given.drain_seconds))
    except MansardError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
