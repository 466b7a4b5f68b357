"""Places for requests: so many run at once, so many more wait, the rest get 429 at once; shared out among owners.

An owner is a tenant, or where nobody needs a key a client's address. Guarantees: nobody gets more than SHARE times what
is free, of places as of waiting, so some is free for whoever has none, however many others hold; a place that becomes
free goes to the owner with the fewest, within it in order of arrival; it is given back exactly once, whoever is
cancelled while it changes hands; nobody waits longer than `wait_seconds`. Where none is free, the answer goes that its
client has not read for longest (STALLED_SECONDS at least). Not covered: how often an owner may ask (rates.py).
"""

import asyncio
import time
from collections import deque
from typing import Protocol

from mansard.serving.router.policy import Refused

RETRY_AFTER_SECONDS = 2
SHARE = 4
"""One owner alone gets four fifths, two get 4/9 each (the dynamic thresholds of Choudhury and Hahne, 1998)."""
STALLED_SECONDS = 1.0


class Client(Protocol):
    """Whom an answer goes to. `stalled_since` is monotonic; None while it reads what it is sent."""

    stalled_since: float | None

    def cut_off(self) -> None: ...


class Places:
    """`async with places.hold(owner, client):` holds one."""

    def __init__(self, running: int, waiting: int, wait_seconds: float) -> None:
        self.running = 0
        self.waiting = 0
        self.max_running = running
        self.max_waiting = waiting
        self.wait_seconds = wait_seconds
        self._holders: dict[Place, None] = {}
        self._counts: dict[str, int] = {}
        self._lines: dict[str, deque[asyncio.Future[None]]] = {}

    def hold(self, owner: str, client: Client | None) -> "Place":
        return Place(self, owner, client)

    def is_free_for(self, owner: str) -> bool:
        return self._counts.get(owner, 0) < SHARE * (self.max_running - self.running)

    async def enter(self, place: "Place") -> None:
        owner = place.owner
        if owner not in self._lines and self.is_free_for(owner):
            self._take(owner)
        else:
            has_made_room = self._cut_off_stalled(owner)
            line = self._lines.get(owner, ())
            if not has_made_room and len(line) >= SHARE * (self.max_waiting - self.waiting):
                message = f"{self._counts.get(owner, 0)} requests of yours run and {len(line)} wait"
                raise Refused(429, "rate_limit_error", message, RETRY_AFTER_SECONDS)
            await self._wait(owner)
        self._holders[place] = None

    def leave(self, place: "Place") -> None:
        del self._holders[place]
        self._give_back(place.owner)

    async def _wait(self, owner: str) -> None:
        turn = asyncio.get_running_loop().create_future()
        line = self._lines.setdefault(owner, deque())
        line.append(turn)
        self.waiting += 1
        try:
            async with asyncio.timeout(self.wait_seconds):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # it was given the place in the same moment
                self._give_back(owner)
            if isinstance(error, TimeoutError):
                message = f"no place became free within {self.wait_seconds:g} s"
                raise Refused(429, "rate_limit_error", message, RETRY_AFTER_SECONDS) from error
            raise
        finally:
            self.waiting -= 1
            if turn in line:
                line.remove(turn)
            if not line and self._lines.get(owner) is line:
                del self._lines[owner]

    def _take(self, owner: str) -> None:
        self.running += 1
        self._counts[owner] = self._counts.get(owner, 0) + 1

    def _give_back(self, owner: str) -> None:
        self.running -= 1
        self._counts[owner] -= 1
        if not self._counts[owner]:
            del self._counts[owner]
        while self._lines and self.running < self.max_running:
            owners = [one for one in self._lines if self.is_free_for(one)]
            if not owners:
                return
            self._admit(min(owners, key=lambda one: self._counts.get(one, 0)))

    def _admit(self, owner: str) -> None:
        line = self._lines[owner]
        turn = line.popleft()
        if not line:
            del self._lines[owner]
        if not turn.done():
            self._take(owner)
            turn.set_result(None)

    def _cut_off_stalled(self, owner: str) -> bool:
        """Whether a place is about to become free: of the owner's own where its share is full, else anybody's."""
        is_full, latest = self.running >= self.max_running, time.monotonic() - STALLED_SECONDS
        stalled = [
            (place.client.stalled_since, place.client)
            for place in self._holders
            if place.client is not None
            and place.client.stalled_since is not None
            and place.client.stalled_since < latest
            and (is_full or place.owner == owner)
        ]
        if not stalled:
            return False
        _, client = min(stalled, key=lambda one: one[0])
        client.stalled_since = None
        client.cut_off()
        return True


class Place:
    """One request's. `client` is None where nobody can be cut off."""

    __slots__ = ("_places", "client", "owner")

    def __init__(self, places: Places, owner: str, client: Client | None) -> None:
        self._places = places
        self.owner = owner
        self.client = client

    async def __aenter__(self) -> None:
        await self._places.enter(self)

    async def __aexit__(self, *raised: object) -> None:
        self._places.leave(self)
