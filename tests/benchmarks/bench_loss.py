"""What users lose while everything happens: 50,000 requests, 64 at once, half of them streams, releases and kills.

The host, the router's supervisor and its two workers are the real ones; engines are the tests' stand-in, started by the
host with vLLM's command line. Under load: version 2 is deployed, walks 5-25-50-100 and is promoted; rollback; version 3
walks and its engine is killed -9; a router worker is killed -9; version 4 walks and the host is killed -9, started
again, and the canary has ended. Last line: JSON with `requests`, `lost_on_stable`, `broken_on_killed`.

A failure is *on killed* when the process that had accepted it was killed while it ran: the canary's engine (then a
stream must have ended with an error event, else it counts as lost), or the router worker (its connection broke at the
moment of the kill; a request begun after the kill never counts here). Every other failure is *lost on stable*.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loss_load import Failed, Load
from serving_place import place_class

RELEASE = {
    "steps": [
        {"weight_percent": weight, "bake_seconds": 1.0, "min_requests": 100, "deadline_seconds": 240}
        for weight in (5, 25, 50, 100)
    ],
    "max_error_excess": 0.02,
    "latency_tolerance": 50.0,  # stand-ins on a loaded machine; what is counted here are lost requests
}
SECONDS_PER_TOKEN = 0.003
KILL_SECONDS = 5.0
"""A broken connection is noticed by its user within this, on a busy machine."""


@dataclass
class Kills:
    """When what was killed, by the monotonic clock."""

    workers: list[float] = field(default_factory=list)
    engines: list[tuple[float, int]] = field(default_factory=list)

    def explain(self, failed: Failed) -> bool:
        """Whether a killed process had accepted this request."""
        if any(failed.began <= moment <= failed.ended <= moment + KILL_SECONDS for moment in self.workers):
            return failed.status in (None, 200) and not failed.has_error_event
        is_on_engine = any(
            version == failed.version and failed.began <= moment <= failed.ended for moment, version in self.engines
        )
        return is_on_engine and failed.is_stream and failed.has_error_event


class Story:
    """The phases, each under the load's eyes."""

    def __init__(self, place: Any, load: Load) -> None:
        self.place = place
        self.load = load
        self.kills = Kills()
        self._begun = time.monotonic()

    def say(self, words: str) -> None:
        load = self.load
        print(f"{time.monotonic() - self._begun:6.1f} s {load.num_done:6} done {len(load.failed):4} failed  {words}")

    def register(self, voice: str) -> int:
        return int(self.place.register(RELEASE, voice=voice, seconds_per_token=SECONDS_PER_TOKEN))

    def release(self, version: int) -> None:
        ended = self.place.release(version)
        self.say(f"version {version}: {ended['state']}: {ended['reason'][:90]}")
        assert ended["state"] == "promoted", ended

    def walk_until_canary(self, version: int) -> None:
        """Start a rollout and wait until users are on the canary."""
        self.place.approve(version)
        self.place.start_rollout(version)
        self.place.wait_for("the canary", lambda: self.place.rollout()["weight_percent"] >= 25)

    def kill_engine_of_canary(self, version: int) -> None:
        self.walk_until_canary(version)
        pid = self.place.engine_of(version)["pid"]
        self.kills.engines.append((time.monotonic(), version))
        os.kill(pid, signal.SIGKILL)
        ended = self.place.wait_for_end()
        self.say(f"version {version}: engine killed: {ended['state']}: {ended['reason'][:90]}")
        assert ended["state"] == "aborted", ended

    def kill_router_worker(self) -> None:
        pid = self._worker_pid()
        self.kills.workers.append(time.monotonic())
        os.kill(pid, signal.SIGKILL)
        self.place.wait_for("the worker's successor", lambda: self._worker_pid() not in (0, pid))
        self.say("a router worker was killed; its successor answers")

    def kill_host(self, version: int) -> None:
        self.walk_until_canary(version)
        self.place.end_host(signal.SIGKILL)
        self.say(f"host killed with version {version} at {self.place.split().canary_percent} %")
        self.place.start_host()
        ended = self.place.wait_for_end()
        self.say(f"version {version} after the host's return: {ended['state']}: {ended['reason'][:80]}")

    def _worker_pid(self) -> int:
        from mansard.serving.client import router_observations_by_worker

        return int(router_observations_by_worker(self.place.site, 5.0).get("0", {"pid": 0})["pid"])


def tell(place: Any, num_requests: int) -> dict[str, Any]:
    """The whole story on a place with a host; its figures."""
    load = Load(place.site.ports.router)
    story = Story(place, load)
    router = place.start_supervisor()
    try:
        story.release(story.register("one"))
        load.start()
        two = story.register("two")
        story.release(two)
        story.say(place.roll_back()["message"])
        story.kill_engine_of_canary(story.register("three"))
        story.kill_router_worker()
        story.kill_host(story.register("four"))
        place.wait_for(f"{num_requests} requests", lambda: load.num_done >= num_requests, 600)
        story.say("enough")
    finally:
        load.stop()
        router.terminate()
        router.wait()
    return figures(load, story.kills)


def figures(load: Load, kills: Kills) -> dict[str, Any]:
    on_killed = [failed for failed in load.failed if kills.explain(failed)]
    lost = [failed for failed in load.failed if not kills.explain(failed)]
    for failed in lost[:20]:
        print(f"lost: {failed}")
    return {
        "requests": load.num_done,
        "streams": load.num_streams,
        "lost_on_stable": len(lost),
        "broken_on_killed": len(on_killed),
        "by_version": dict(sorted(load.by_version.items())),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=50_000)
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="mansard-"))
    place = place_class()(home)
    try:
        place.start_host()
        found = tell(place, options.requests)
    finally:
        place.close()
        shutil.rmtree(home)
    print(json.dumps(found))
    return 0 if found["lost_on_stable"] == 0 and found["requests"] >= options.requests else 1


if __name__ == "__main__":
    sys.exit(main())
