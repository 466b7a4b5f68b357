"""How often a tenant may ask: one rate over all router workers, kept in memory that they share.

The generic cell rate algorithm (ITU-T I.371): per tenant one number, the time at which a request would be due if all
came evenly; a request that comes too far ahead of it is refused. Guarantees: over any minute at most the rate plus the
burst passes. Two workers that count in the same microsecond may pass one request more. Not covered: tokens, bytes, and
tenants without keys.
"""

import math
import mmap
import os
import struct

from mansard.serving.router.keys import MAX_NAMES, Holder
from mansard.serving.router.policy import Refused

BURST_SECONDS = 6.0
"""What a tenant saves up while it is silent: a tenth of a minute's requests may come at once."""
_DUE = struct.Struct("d")


def shared_memory() -> int:
    """A descriptor of memory for all tenants' numbers; children that inherit it share them."""
    descriptor = os.memfd_create("mansard-rates")
    os.ftruncate(descriptor, MAX_NAMES * _DUE.size)
    return descriptor


class Rates:
    """The numbers behind a descriptor of `shared_memory`. `now` below is the machine's monotonic clock in seconds."""

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, MAX_NAMES * _DUE.size)

    def check(self, holder: Holder, now: float) -> None:
        """Count one request; 429 with the seconds to wait when it comes too early."""
        if holder.requests_per_minute is None:
            return
        interval = 60.0 / holder.requests_per_minute
        burst = max(BURST_SECONDS, interval)
        place = holder.slot * _DUE.size
        due = float(_DUE.unpack_from(self._memory, place)[0])
        if not now < due <= now + burst:  # long ago; or from another tenant's slot before the file changed
            due = now
        early = due + interval - now - burst
        if early > 1e-9:
            message = f"{holder.name} may ask {holder.requests_per_minute} times a minute"
            raise Refused(429, "rate_limit_error", message, math.ceil(early))
        _DUE.pack_into(self._memory, place, due + interval)
