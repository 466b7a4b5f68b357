"""Places for requests: so many run at once, so many more wait in order of arrival, the rest get 429 at once.

Guarantees: a place is given back exactly once, whoever is cancelled while it changes hands; nobody waits longer than
`wait_seconds`. Not covered: fairness between tenants (rates.py bounds each).
"""

import asyncio
from collections import deque

from mansard.serving.router.policy import Refused

RETRY_AFTER_SECONDS = 2


class Places:
    """`async with places:` holds one."""

    def __init__(self, running: int, waiting: int, wait_seconds: float) -> None:
        self.running = 0
        self.waiting = 0
        self._max_running = running
        self._max_waiting = waiting
        self._wait_seconds = wait_seconds
        self._line: deque[asyncio.Future[None]] = deque()

    async def __aenter__(self) -> None:
        if self.running < self._max_running:
            self.running += 1
            return
        if self.waiting >= self._max_waiting:
            message = f"{self._max_running} requests run and {self._max_waiting} wait"
            raise Refused(429, "rate_limit_error", message, RETRY_AFTER_SECONDS)
        await self._wait()

    async def _wait(self) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._line.append(turn)
        self.waiting += 1
        try:
            async with asyncio.timeout(self._wait_seconds):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # it was given the place in the same moment
                self._pass_on()
            if isinstance(error, TimeoutError):
                message = f"no place became free within {self._wait_seconds:g} s"
                raise Refused(429, "rate_limit_error", message, RETRY_AFTER_SECONDS) from error
            raise
        finally:
            self.waiting -= 1

    async def __aexit__(self, *raised: object) -> None:
        self._pass_on()

    def _pass_on(self) -> None:
        while self._line:
            turn = self._line.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.running -= 1
