"""How long a rollback takes: from the pointer's entry in the journal to the first answer of previous, under load.

The host, the router's supervisor and its workers are the real ones; the engines are instant stand-ins that the host
starts with vLLM's command line. 32 users ask all the time. A drill is `mansard rollback --from A --to B` from a shell;
the next goes the other way. Its milliseconds are from the time stamp of the journal's entry (taken before the commit)
to the end of the first answer that the router routed to B; `shell_ms` is the median of the whole command. The last line
is JSON: drills, p50_ms, p99_ms, shell_ms, shell_p99_ms, failed_requests (of users, in all of it).
"""

import argparse
import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from pathlib import Path
from typing import Any

from busy_users import Users
from serving_place import place_class

from mansard.release.events import ROLLED_BACK, as_moment
from mansard.release.journal import Journal

ROOT = Path(__file__).resolve().parents[2]
NUM_USERS = 32
PAUSE_SECONDS = 0.15
"""Of a user between two requests: about 200 requests a second, the half of what this load generator can."""
STEP = {"weight_percent": 100, "bake_seconds": 0.0, "min_requests": 50, "deadline_seconds": 300}
RELEASE = {"steps": [STEP], "max_error_excess": 0.05, "latency_tolerance": 50.0}


Answer = tuple[float, str, int]
"""Wall-clock end, version, status."""


def users_of(port: int) -> Users[Answer]:
    """Each on a kept connection."""
    body = json.dumps({"model": "demo", "prompt": "x", "max_tokens": 1}).encode()
    connections = [http.client.HTTPConnection("127.0.0.1", port, timeout=60) for _ in range(NUM_USERS)]

    def ask(user: int, turn: int) -> Answer:
        headers = {"content-type": "application/json", "x-mansard-session": f"user-{user}-{turn % 10}"}
        connections[user].request("POST", "/v1/completions", body, headers)
        answer = connections[user].getresponse()
        answer.read()
        return time.time(), answer.getheader("x-mansard-version") or "", answer.status

    return Users(ask, NUM_USERS, PAUSE_SECONDS)


def first_after(answers: list[Answer], moment: float, version: int) -> float | None:
    """When the first answer of the version ended after `moment`; `answers` are sorted."""
    for ended, by, _ in answers[bisect_left(answers, (moment, "", 0)) :]:
        if by == str(version):
            return ended
    return None


def drill(place: Any, from_version: int, to_version: int) -> float:
    """One rollback from the shell; its milliseconds, whole."""
    words = ["rollback", "--from", str(from_version), "--to", str(to_version), "--as", "ada", "--why", "drill"]
    command = [sys.executable, "-m", "flows.cli", *words, "--site", str(place.site.path)]
    begun = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return (time.perf_counter() - begun) * 1000


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def run(place: Any, num_drills: int) -> dict[str, Any]:
    router = place.start_supervisor()
    users = users_of(place.site.ports.router)
    try:
        assert place.release(place.register())["state"] == "promoted"
        place.wait_for("version 1", lambda: place.ask() == (200, "1"))
        users.start()
        place.wait_for("users", lambda: len(users.answers) > 1000)
        ended = place.release(place.register(RELEASE, voice="b"))
        assert ended["state"] == "promoted", ended
        shell, stable = [], 2
        for _ in range(num_drills):
            shell.append(drill(place, stable, 3 - stable))
            stable = 3 - stable
            place.wait_for("the other version", lambda now=stable: users.answers[-1][1] == str(now))
    finally:
        users.stop()
        router.terminate()
        router.wait()
    with Journal.open(place.site.journal) as journal:
        moves = [(as_moment(e.at).timestamp(), e.body["to"]) for e in journal.entries("demo", kinds=(ROLLED_BACK,))]
    answers = sorted(users.answers)
    took = [((first_after(answers, at, to) or float("inf")) - at) * 1000 for at, to in moves]
    rate = len(answers) / (answers[-1][0] - answers[0][0])
    print(f"{len(moves)} drills under {rate:.0f} requests/s; slowest {max(took):.1f} ms, shell {max(shell):.0f} ms")
    return {
        "drills": len(moves),
        "p50_ms": round(quantile(took, 0.5), 2),
        "p99_ms": round(quantile(took, 0.99), 2),
        "shell_ms": round(quantile(shell, 0.5), 1),
        "shell_p99_ms": round(quantile(shell, 0.99), 1),
        "failed_requests": sum(status != 200 for _, _, status in answers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drills", type=int, default=100)
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="mansard-"))
    place = place_class()(home)
    try:
        place.start_host()
        figures = run(place, options.drills)
    finally:
        place.close()
        shutil.rmtree(home)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
