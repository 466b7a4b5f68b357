"""Reads the /metrics of a rollout's two engines while it runs: what they measured themselves, and whether one hangs.

Both data planes are alike here. Does not cover: decisions (the walk blames the canary for what is `hung`).
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mansard.serving.engine import http as engine_http
from mansard.serving.engine.metrics import Account, means_text

ASK_SECONDS = 2.0
SIDES = ("canary", "stable")

FindEndpoint = Callable[[str], str | None]
"""Side -> where its engine answers; None while it does not."""


@dataclass(slots=True)
class EngineAccounts:
    """Of one rollout. `waiting` are the data plane's requests without a first byte at each side, when it was asked."""

    session: Any
    find_endpoint: FindEndpoint
    waiting: Mapping[str, int] = field(default_factory=dict)
    accounts: dict[str, Account] = field(default_factory=lambda: {side: Account() for side in SIDES})

    async def run(self) -> None:
        """Ask until cancelled."""
        asked = time.monotonic()
        while True:
            await asyncio.sleep(ASK_SECONDS)
            # A machine that was held up asks late; it may not blame the engines for that.
            seconds, asked = min(time.monotonic() - asked, 2 * ASK_SECONDS), time.monotonic()
            await self.ask(seconds)

    async def ask(self, seconds: float) -> None:
        """Once; `seconds` after the last time."""
        await asyncio.gather(*(self._ask(side, seconds) for side in SIDES))

    async def _ask(self, side: str, seconds: float) -> None:
        endpoint = self.find_endpoint(side)
        metrics = None if endpoint is None else await engine_http.metrics(self.session, endpoint)
        self.accounts[side].take(metrics, self.waiting.get(side, 0), seconds)

    def begin_step(self) -> None:
        for account in self.accounts.values():
            account.begin_step()

    @property
    def hung(self) -> str:
        """What the canary's engine is to be blamed for; empty while it moves."""
        account = self.accounts["canary"]
        still = f"requests in flight, and no token, prompt or memory moved for {account.still_seconds:.0f} s"
        return f"its engine hangs: {still}" if account.is_hung else ""

    def text(self) -> str:
        """The means of the step, beside each other."""
        return means_text(*(self.accounts[side].means() for side in SIDES))

    def describe(self) -> dict[str, Any]:
        means = {side: {k: round(v, 6) for k, v in account.means().items()} for side, account in self.accounts.items()}
        return {**means, "text": self.text()}
