"""How many users a release has and how many each of its steps needs, before anything starts.

A user is a sticky key that had an answer or an error lately: in the last MAX_RECORDS of each router worker. Which of
them would be the canary's follows from their hashes, so the figures are exact for those users; whether they come back
during the step nobody knows. Does not cover: the first version of a model, which is compared with nobody.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from mansard.errors import Conflict
from mansard.release.analysis import MIN_KEYS
from mansard.release.rollout import Step
from mansard.serving.host.sticky_keys import RecordTail, is_canary_key
from mansard.site import Site


@dataclass(frozen=True, slots=True)
class StepUsers:
    """One step: the users seen lately who would be the canary's, and stable's. At 100 % each is compared with itself
    before, so there stable needs none."""

    weight_percent: int
    canary: int
    stable: int

    @property
    def is_enough(self) -> bool:
        return self.canary >= MIN_KEYS and (self.stable >= MIN_KEYS or self.weight_percent == 100)

    @property
    def usual_users(self) -> int:
        """So many users have MIN_KEYS on both sides, on average."""
        return math.ceil(MIN_KEYS * 100 / min(self.weight_percent, 100 - self.weight_percent % 100))


@dataclass(frozen=True, slots=True)
class ReleaseUsers:
    """`seen` users; `is_heard` is false where a router worker that runs did not tell of its own."""

    seen: int
    steps: tuple[StepUsers, ...]
    is_heard: bool = True

    def as_json(self) -> dict[str, Any]:
        steps = [
            {"weight_percent": step.weight_percent, "canary": step.canary, "stable": step.stable} for step in self.steps
        ]
        return {"seen": self.seen, "needed_on_each_side": MIN_KEYS, "steps": steps}

    def check(self, model: str, version: int) -> None:
        """Conflict for the first step that would find too few."""
        for number, step in enumerate(self.steps, 1):
            if not step.is_enough:
                sides = f"{step.canary} of them and stable {step.stable}" if step.weight_percent < 100 else "them all"
                unheard = "" if self.is_heard else "a router worker did not answer, and "
                raise Conflict(
                    f"{model} version {version}: too few users for step {number} of {len(self.steps)} "
                    f"({step.weight_percent} %): {unheard}{self.seen} users asked lately, its canary would see "
                    f"{sides}, and {MIN_KEYS} on each side are needed (about {step.usual_users} users); name users in "
                    "requests (`user` in the body or x-user-id: README, For clients), or take another weight_percent"
                )


def users_of(keys: Collection[str], steps: Sequence[Step], is_heard: bool = True) -> ReleaseUsers:
    """The figures for these sticky keys' digests."""
    step_users = []
    for step in steps:
        canary = sum(is_canary_key(key, step.weight_percent) for key in keys)
        step_users.append(StepUsers(step.weight_percent, canary, len(keys) - canary))
    return ReleaseUsers(len(keys), tuple(step_users), is_heard)


async def read_users(site: Site, model: str, steps: Sequence[Step]) -> ReleaseUsers:
    """The figures for who asked lately."""
    records, is_heard = await RecordTail(site, model).read()
    keys = {record.key for record in records if record.outcome in ("ok", "error")}
    return users_of(keys, steps, is_heard)
