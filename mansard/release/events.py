"""The records of the release side: journal entries and pointers. Standard library only.

An entry's digest is the SHA-256 of the canonical JSON of everything else in it, the digest of the entry before
included; so nobody edits, removes or reorders one without breaking every later one. Not covered here: a tail that is
cut off whole (tip.py's).
"""

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mansard.canonical import sha256_json

FORMAT = 1
GENESIS = "0" * 64
"""What the first entry has in the place of the digest of the one before."""

ATTEMPTED = "attempted"
REGISTERED = "registered"
JUDGED = "judged"
APPROVED = "approved"
REJECTED = "rejected"
ROLLOUT_STARTED = "rollout_started"
CANARY_STEP = "canary_step"
PROMOTED = "promoted"
ABORTED = "aborted"
ROLLED_BACK = "rolled_back"
PEOPLE_CHANGED = "people_changed"
EMERGENCY = "emergency"
STABLE_DOWN = "stable_down"
STABLE_UP = "stable_up"

MOVES = (ROLLOUT_STARTED, CANARY_STEP, PROMOTED, ABORTED, ROLLED_BACK, EMERGENCY)
"""Entries that raise the term. `body` holds `version` (for rolled_back: the one left, and `to`), `before`, `after`.

EMERGENCY only raises it: an emergency entry (emergency.py) that needed no move any more, or that no move can follow.
"""
EVIDENCE = (REGISTERED, JUDGED)
"""Entries whose body holds a registration; the newest of a version is what approvals speak of."""
DECISIONS = (APPROVED, REJECTED)
OUTAGES = (STABLE_DOWN, STABLE_UP)
"""Entries about stable's engine (outage.py). They move no pointer and take no term."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One event. `at` is UTC ISO 8601 with microseconds; `model` is empty for what concerns the whole site."""

    sequence: int
    model: str
    kind: str
    at: str
    who: str
    why: str
    body: dict[str, Any]
    previous_digest: str
    digest: str
    format: int = FORMAT

    @property
    def version(self) -> int | None:
        """The version that the event is about."""
        found = self.body.get("version")
        return found if isinstance(found, int) else None

    def computed_digest(self) -> str:
        """What `digest` must be."""
        return sha256_json(
            {
                "format": self.format,
                "sequence": self.sequence,
                "model": self.model,
                "kind": self.kind,
                "at": self.at,
                "who": self.who,
                "why": self.why,
                "body": self.body,
                "previous_digest": self.previous_digest,
            }
        )


@dataclass(frozen=True, slots=True)
class Pointers:
    """Where a model stands. `term` is the global term of its last move; 0 before the first."""

    stable: int | None = None
    canary: int | None = None
    previous: int | None = None
    term: int = 0


@dataclass(frozen=True, slots=True)
class Uptime:
    """Seconds since a boot, which no clock that is set changes. Of two boots they cannot be compared."""

    boot: str
    seconds: float


def uptime_now() -> Uptime:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return Uptime(boot, round(time.clock_gettime(time.CLOCK_BOOTTIME), 3))


def utc_now() -> datetime:
    return datetime.now(UTC)


def as_text(moment: datetime) -> str:
    """UTC with microseconds and Z: sorts as text."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def as_moment(text: str) -> datetime:
    return datetime.fromisoformat(text)
