"""How many users a release has and how many each of its steps needs, before anything starts.

A user is a sticky key that had an answer or an error lately: in the last MAX_RECORDS of each router worker. Names cost
nothing, so of one tenant only as many count as of all others together, unless there is nobody else. Which of them would
be the canary's follows from the rollout's salt: one is drawn under which all steps find enough, where there is one, so
the figures are exact for those users; whether they come back during the step nobody knows. Does not cover: the first
version of a model, which is compared with nobody.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mansard.errors import Conflict
from mansard.release.analysis import MIN_KEYS
from mansard.release.rollout import Step
from mansard.release.tenants import counted, tenants_of
from mansard.serving.host.sticky_keys import RecordTail, is_canary_user, tenant_numbers, tenant_of
from mansard.serving.split import new_salt
from mansard.site import Site

SALTS = 8
"""Drawn at most: 120 users have 30 at 25 % half of the time."""


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
    """`seen` users count, of `named` that asked; `is_heard` is false where a router worker that runs did not tell of
    its own."""

    seen: int
    steps: tuple[StepUsers, ...]
    is_heard: bool = True
    named: int = 0

    def as_json(self) -> dict[str, Any]:
        steps = [
            {"weight_percent": step.weight_percent, "canary": step.canary, "stable": step.stable} for step in self.steps
        ]
        return {"seen": self.seen, "named": self.named, "needed_on_each_side": MIN_KEYS, "steps": steps}

    def check(self, model: str, version: int) -> None:
        """Conflict for the first step that would find too few."""
        for number, step in enumerate(self.steps, 1):
            if not step.is_enough:
                sides = f"{step.canary} of them and stable {step.stable}" if step.weight_percent < 100 else "them all"
                names = "" if self.named == self.seen else f" (of {self.named} names, most of them one tenant's)"
                unheard = "" if self.is_heard else "a router worker did not answer, and "
                raise Conflict(
                    f"{model} version {version}: too few users for step {number} of {len(self.steps)} "
                    f"({step.weight_percent} %): {unheard}{self.seen} users asked lately{names}, its canary would see "
                    f"{sides}, and {MIN_KEYS} on each side are needed (about {step.usual_users} users); name users in "
                    "requests (`user` in the body or x-user-id: README, For clients), or take another weight_percent"
                )


def users_of(users: Collection[str], steps: Sequence[Step], salt: str, is_heard: bool = True) -> ReleaseUsers:
    """The figures for these users (digests of sticky key and tenant)."""
    is_sole = tenants_of(tenant_numbers(users), len(users)).sole is not None

    def count(some: Iterable[str]) -> int:
        return counted(list(Counter(map(tenant_of, some)).values()), is_sole)

    step_users = []
    for step in steps:
        is_canary = {user: is_canary_user(user, step.weight_percent, salt) for user in users}
        canary = count(user for user in users if is_canary[user])
        step_users.append(StepUsers(step.weight_percent, canary, count(user for user in users if not is_canary[user])))
    return ReleaseUsers(count(users), tuple(step_users), is_heard, len(users))


def salted(users: Collection[str], steps: Sequence[Step], is_heard: bool = True) -> tuple[str, ReleaseUsers]:
    """A salt under which every step finds enough of these users, or the last of SALTS that were drawn."""
    for _ in range(SALTS):
        salt = new_salt()
        figures = users_of(users, steps, salt, is_heard)
        if all(step.is_enough for step in figures.steps):
            break
    return salt, figures


async def read_users(site: Site, model: str, steps: Sequence[Step]) -> tuple[str, ReleaseUsers]:
    """A salt for a rollout, and its figures for who asked lately."""
    records, is_heard = await RecordTail(site, model).read()
    users = {record.user for record in records if record.outcome in ("ok", "error")}
    return salted(users, steps, is_heard)
