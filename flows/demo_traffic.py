"""Users for the demo and the end-to-end test: requests through the router, half of them streaming.

`python -m flows.demo_traffic URL MODEL SUMMARY.json [PROMPT ...]` runs until SIGTERM, then writes the counts. A request
has failed when it does not end with status 200 and text; a stream is broken when it ends without `[DONE]` or carries an
error.
"""

import asyncio
import json
import random
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import aiohttp

from mansard.canonical import write_atomically

USERS = 160
"""A canary at 25 % has 40 of them, and is judged on 30 at least."""
CONCURRENCY = 8
PAUSE_SECONDS = 0.15
PROMPTS = ("Return a new list of", "Raise TypeError when", "class Node:", "def main(", "import os\n", "This function")


@dataclass(slots=True)
class Counts:
    """What the users saw. `versions` counts answers by the version stamped on them; none, while a canary
    runs."""

    requests: int = 0
    streams: int = 0
    failed: int = 0
    broken_streams: int = 0
    versions: dict[str, int] = field(default_factory=dict)
    first_failures: list[str] = field(default_factory=list)

    def saw(self, version: str, fault: str, is_stream: bool) -> None:
        self.requests += 1
        self.streams += is_stream
        if fault:
            self.failed += not is_stream
            self.broken_streams += is_stream
            self.first_failures = [*self.first_failures, fault][:10]
        self.versions[version] = self.versions.get(version, 0) + 1


def is_whole_stream(text: str) -> bool:
    """Whether server-sent events ended with `[DONE]` and none of them is an error (a token may well be "error")."""
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return bool(events) and events[-1] == "[DONE]" and all("choices" in json.loads(e) for e in events[:-1])


async def send(
    session: aiohttp.ClientSession,
    url: str,
    model: str,
    user: str,
    is_stream: bool,
    counts: Counts,
    prompts: Sequence[str] = PROMPTS,
) -> None:
    """One request of one user, counted whatever becomes of it."""
    body = {"model": model, "prompt": random.choice(prompts), "max_tokens": 12, "stream": is_stream}  # noqa: S311
    version, fault = "none", ""
    try:
        async with session.post(f"{url}/v1/completions", json=body, headers={"x-user-id": user}) as answer:
            version = answer.headers.get("x-mansard-version", "none")
            text = await answer.text()
            whole = is_whole_stream(text) if is_stream else '"choices"' in text
            if answer.status != 200 or not whole:
                fault = f"{answer.status}: {text[-200:]}"
    except (aiohttp.ClientError, TimeoutError) as error:
        fault = f"{type(error).__name__}: {error}"
    counts.saw(version, fault, is_stream)


async def run(url: str, model: str, summary: Path, prompts: Sequence[str] = PROMPTS) -> None:
    """Send until SIGTERM; requests under way are finished and counted."""
    counts = Counts()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        workers = [StoppableUser(session, url, model, n, counts, stop, prompts) for n in range(CONCURRENCY)]
        await asyncio.gather(*(w.run() for w in workers), _report(counts, summary, stop))
    write_atomically(summary, json.dumps(asdict(counts)).encode())


@dataclass(slots=True)
class StoppableUser:
    """A user who ends between two requests, never in the middle of one."""

    session: aiohttp.ClientSession
    url: str
    model: str
    number: int
    counts: Counts
    stop: asyncio.Event
    prompts: Sequence[str] = PROMPTS

    async def run(self) -> None:
        turn = place = self.number  # each user once, then any
        while not self.stop.is_set():
            user = f"user-{place if place < USERS else random.randrange(USERS)}"  # noqa: S311 - any user will do
            place += CONCURRENCY
            await send(self.session, self.url, self.model, user, turn % 2 == 0, self.counts, self.prompts)
            turn += 1
            await asyncio.sleep(PAUSE_SECONDS)


async def _report(counts: Counts, summary: Path, stop: asyncio.Event) -> None:
    """Leave the counts so far where the demo can read them."""
    while not stop.is_set():
        write_atomically(summary, json.dumps(asdict(counts)).encode())
        await asyncio.sleep(0.5)


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4:] or PROMPTS))
