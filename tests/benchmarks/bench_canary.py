"""How soon a bad canary is at 0 %: real host, router and engine processes, 20 requests/s on the canary.

`make bench NAME=canary`. 100 users ask at fixed times, whatever comes back, 40 requests/s in all,
half of them to the canary
at 50 %. The stand-in engine of version 2 answers well until users are on it, then answers 500, hangs, or babbles (its
answers to the guard prompts change). Seconds are from then to a split file without the canary. Last line: JSON with
errors_seconds, hang_seconds, babble_seconds, and failed: users' requests that were not answered 200 (those that hang
until the engine is ended count as answered when stable rescued them).
"""

import asyncio
import json
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import aiohttp
from serving_place import place_class

REQUESTS_PER_SECOND = 40.0
NUM_USERS = 100
STEP = {"weight_percent": 50, "bake_seconds": 600, "min_requests": 10, "deadline_seconds": 1200}
RELEASE = {"steps": [STEP], "max_error_excess": 0.02, "latency_tolerance": 5.0}
KINDS = {
    "errors": {"fail_completions": True, "fail_after": 200},
    "hang": {"hang_after": 200},
    "babble": {"babble_after": 200},
}
"""After 200 completions: about ten seconds of users."""


class Users:
    """Requests at fixed times, in a thread with a loop of its own."""

    def __init__(self, port: int) -> None:
        self.failed = self.done = 0
        self._url = f"http://127.0.0.1:{port}/v1/completions"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    async def _run(self) -> None:
        begun, number, tasks = time.monotonic(), 0, set[asyncio.Task[None]]()
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            while not self._stop.is_set():
                await asyncio.sleep(max(begun + number / REQUESTS_PER_SECOND - time.monotonic(), 0.0))
                task = asyncio.create_task(self._ask(session, number % NUM_USERS))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                number += 1
            for task in tasks:
                task.cancel()

    async def _ask(self, session: aiohttp.ClientSession, user: int) -> None:
        body = {"model": "demo", "prompt": "x = ", "max_tokens": 4}
        async with session.post(self._url, json=body, headers={"x-mansard-session": f"user-{user}"}) as answer:
            await answer.read()
            self.done += 1
            self.failed += answer.status != 200


def seconds_to_zero(behaviour: dict[str, Any]) -> tuple[float, int, str]:
    """Seconds from the first bad answer's place in line to a split without the canary, failed requests, the reason."""
    home = Path(tempfile.mkdtemp(prefix="mansard-"))
    place = place_class()(home)
    users = Users(place.site.ports.router)
    try:
        place.start_host()
        router = place.start_supervisor()
        assert place.release(place.register())["state"] == "promoted"
        version = place.register(RELEASE, voice="b", **behaviour)
        users.start()
        place.wait_for("users", lambda: users.done > 300)
        place.approve(version)
        place.start_rollout(version)
        turn = next(value for name, value in behaviour.items() if name.endswith("_after"))
        place.wait_for("the canary's turn", lambda: completions(place, version) >= turn)
        begun = time.monotonic()
        place.wait_for("a split without the canary", lambda: place.split().canary is None)
        took = time.monotonic() - begun
        users.stop()
        router.terminate()
        router.wait()
        return took, users.failed, place.wait_for_end()["reason"]
    finally:
        users.stop()
        place.close()
        shutil.rmtree(home)


def completions(place: Any, version: int) -> int:
    """What the version's engine was asked so far, told by its own metrics."""
    import urllib.request

    with urllib.request.urlopen(f"{place.engine_of(version)['endpoint']}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return int(next(float(line.split()[-1]) for line in lines if line.startswith("fake:completions")))


def main() -> None:
    figures: dict[str, Any] = {}
    failed = 0
    for name, behaviour in KINDS.items():
        seconds, lost, reason = seconds_to_zero(behaviour)
        print(f"{name}: 0 % after {seconds:.1f} s; {lost} failed requests; {reason[:140]}", flush=True)
        figures[f"{name}_seconds"] = round(seconds, 1)
        failed += lost
    print(json.dumps({**figures, "failed": failed}))


if __name__ == "__main__":
    sys.exit(main())
