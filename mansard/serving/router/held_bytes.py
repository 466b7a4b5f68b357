"""The memory that request bodies take in one worker, shared out among owners (tenants, else addresses).

Guarantees: all bodies together stay below `total_bytes`, and one owner's below a third of it, but for bodies of up to
SMALL_BYTES, which only the total bounds. A body that is still on its way makes room: first the one of the same owner
that nothing came for longest, where the total is reached one of the owner who holds most. Who finds no room gets 429.
Not covered: copies while a body is put together (one at a time).
"""

import time
from collections.abc import Callable

from mansard.serving.router.policy import Refused
from mansard.serving.router.queue import RETRY_AFTER_SECONDS

SMALL_BYTES = 64 * 1024
OWNERS = 3
STALLED_SECONDS = 1.0


class HeldBody:
    """One request's. `drop` ends its reading with the error that it is given."""

    __slots__ = ("_bodies", "_drop", "changed", "is_whole", "owner", "size")

    def __init__(self, bodies: "HeldBytes", owner: str, drop: Callable[[Refused], None]) -> None:
        self._bodies = bodies
        self._drop = drop
        self.owner = owner
        self.size = 0
        self.changed = 0.0
        self.is_whole = False

    def add(self, num_bytes: int) -> None:
        """So many more have come. Raises Refused where there is no room for them."""
        self.changed = time.monotonic()
        self._bodies.add(self, num_bytes)

    def drop(self) -> None:
        """Make room for others."""
        self.release()
        message = "the body came too slowly, and its memory was needed"
        self._drop(Refused(408, "invalid_request_error", message, RETRY_AFTER_SECONDS))

    def release(self) -> None:
        """Its request has ended."""
        self._bodies.remove(self)


class HeldBytes:
    """All bodies of a worker."""

    def __init__(self, total_bytes: int) -> None:
        self._total_limit = total_bytes
        self._owner_limit = total_bytes // OWNERS
        self._total = 0
        self._by_owner: dict[str, int] = {}
        self._bodies: dict[HeldBody, None] = {}

    def body(self, owner: str, drop: Callable[[Refused], None]) -> HeldBody:
        return HeldBody(self, owner, drop)

    def add(self, body: HeldBody, num_bytes: int) -> None:
        self._bodies[body] = None
        self._count(body, num_bytes)
        while self._total > self._total_limit or self._is_above_share(body):
            victim = self._victim(body)
            if victim is None:
                message = f"requests of {self._by_owner[body.owner]} bytes of yours are in work"
                raise Refused(429, "rate_limit_error", message, RETRY_AFTER_SECONDS)
            victim.drop()

    def remove(self, body: HeldBody) -> None:
        if body in self._bodies:
            self._count(body, -body.size)
            del self._bodies[body]

    def _count(self, body: HeldBody, num_bytes: int) -> None:
        body.size += num_bytes
        self._total += num_bytes
        left_over = self._by_owner.get(body.owner, 0) + num_bytes
        if left_over:
            self._by_owner[body.owner] = left_over
        else:
            self._by_owner.pop(body.owner, None)

    def _is_above_share(self, body: HeldBody) -> bool:
        return body.size > SMALL_BYTES and self._by_owner[body.owner] > self._owner_limit

    def _victim(self, newcomer: HeldBody) -> HeldBody | None:
        owner = newcomer.owner
        if self._total > self._total_limit:
            owner = max(self._by_owner, key=lambda one: self._by_owner[one])
        latest = newcomer.changed - STALLED_SECONDS if owner == newcomer.owner else newcomer.changed
        coming = [one for one in self._bodies if one.owner == owner and not one.is_whole and one is not newcomer]
        oldest = min(coming, key=lambda one: one.changed, default=None)
        return oldest if oldest is not None and oldest.changed <= latest else None
