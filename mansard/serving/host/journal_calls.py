"""The journal for the host's loop: every question and every move runs in one thread, because a database on another
machine may give no answer, and the loop serves leases, the traffic split and people meanwhile.

Guarantees: calls run one after another in the order in which they were made, and their callers go on in that order, so
what a caller writes into the traffic split right after its move stands there before any later move's; the database
itself bounds each call (postgres_database.py). Does not cover: what changes while a call runs; a caller compares
(`expected`) or reads again. JournalWatch has a connection and a thread of its own.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from mansard.errors import JournalDown
from mansard.release.journal import Journal
from mansard.site import Site

T = TypeVar("T")


class JournalCalls:
    """Of one open journal; `is_remote` where another machine may keep it."""

    def __init__(self, journal: Journal, is_remote: bool) -> None:
        self._journal = journal
        self._is_remote = is_remote
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")

    async def call(self, ask: Callable[[Journal], T], patience_seconds: float | None = None) -> T:
        """What `ask` returns or raises.

        JournalDown where a remote journal has not answered in `patience_seconds`: a call that runs then goes on, and
        may still move; one that waits for its turn never runs.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        job = self._thread.submit(ask, self._journal)

        def wake(job: "Future[T]") -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(_hand_over, job, answer)

        job.add_done_callback(wake)
        if patience_seconds is not None and self._is_remote:
            timer = loop.call_later(patience_seconds, self._give_up, job, answer, patience_seconds)
            answer.add_done_callback(lambda _: timer.cancel())
        try:
            return await answer
        finally:
            job.cancel()

    @staticmethod
    @contextlib.asynccontextmanager
    async def of(journal: Journal, site: Site) -> AsyncIterator["JournalCalls"]:
        """For a while; ends after the call that runs then."""
        calls = JournalCalls(journal, is_remote=not isinstance(site.journal, Path))
        try:
            yield calls
        finally:
            await asyncio.to_thread(calls._thread.shutdown, cancel_futures=True)

    def _give_up(self, job: "Future[T]", answer: "asyncio.Future[T]", seconds: float) -> None:
        if not answer.done():
            job.cancel()
            message = f"journal {self._journal.name}: no answer in {seconds:g} s; does the server run?"
            answer.set_exception(JournalDown(message))


def _hand_over(job: "Future[T]", answer: "asyncio.Future[T]") -> None:
    if answer.done():
        return
    try:
        answer.set_result(job.result())
    except CancelledError:
        answer.cancel()
    except BaseException as error:  # noqa: BLE001 - raised where it is waited for
        answer.set_exception(error)
