"""The care of one canary's engine while its rollout runs: made ready, asked again and again, its lease held.

What goes wrong becomes the walk's `problem`, on which the state machine aborts at once. Does not cover: decisions.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from mansard.errors import MansardError
from mansard.serving.engine import http as engine_http
from mansard.serving.engine.engine import Engine
from mansard.serving.host.residents import Residents
from mansard.serving.host.traffic import Traffic

LEASE_SECONDS = 1.0
"""Router workers take the canary to 0 % when the lease has stood still for 10 s."""
GUARD_SECONDS = 5.0
"""Between two rounds of guard prompts to the canary."""

log = logging.getLogger(__name__)

FindFingerprintChange = Callable[[str, int, Engine, float], Awaitable[str]]
"""How the fingerprint of (model, version) differs from the recorded one; empty when it does not. MansardError when the
engine has not answered in so many seconds."""


@dataclass(slots=True)
class Canary:
    """The engine of (model, version), from before it starts. `problem` is set once and stays.

    `answer_seconds`: whoever answers a guard prompt later than that has failed.
    """

    model: str
    version: int
    residents: Residents
    traffic: Traffic
    find_fingerprint_change: FindFingerprintChange
    session: Any
    answer_seconds: float
    engine: Engine | None = None
    is_ready: bool = False
    problem: str = ""

    def blame(self, problem: str) -> None:
        self.problem = self.problem or problem

    async def prepare(self) -> None:
        """Engine, one real request, fingerprint: alone, before it has traffic."""
        try:
            engine = await self.residents.ready(self.model, self.version)
            self.engine = engine
            name = self.residents.name(self.model, self.version)
            await engine_http.complete_one_token(self.session, engine.endpoint, name, self.answer_seconds)
            change = await self.find_fingerprint_change(self.model, self.version, engine, self.answer_seconds)
        except (MansardError, OSError) as error:
            self.blame(str(error))
            return
        if change:
            self.blame(f"its fingerprint is not the one that evaluation recorded: {change}")
        elif engine.state != "ready":
            self.blame(f"its engine died: {engine.problem}")
        else:
            self.is_ready = True

    async def hold_lease(self) -> None:
        """Raise the lease counter until cancelled."""
        while True:
            await asyncio.sleep(LEASE_SECONDS)
            try:
                self.traffic.renew_lease(self.model)
            except (MansardError, OSError) as error:  # somebody else wrote a later term, or the disk is full
                self.blame(f"the lease could not be renewed: {error}")

    async def ask_guard_prompts(self) -> None:
        """The guard prompts again and again, beside the users' own requests, until cancelled.

        Two rounds in a row must differ: beside other requests the same engine may round otherwise once.
        """
        while not self.problem:
            await asyncio.sleep(GUARD_SECONDS)
            first = await self._change()
            if first and await self._change():
                self.blame(f"its answers to the guard prompts changed: {first}")

    async def _change(self) -> str:
        assert self.engine is not None, "a canary has an engine"
        try:
            return await self.find_fingerprint_change(self.model, self.version, self.engine, self.answer_seconds)
        except MansardError as error:
            self.blame(f"a probe failed: {error}")
        return ""
