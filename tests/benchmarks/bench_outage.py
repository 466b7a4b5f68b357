"""What users lose when stable's engine is killed under load: with `when_stable_is_dead: wait`, then with `previous`.

Host, router worker and journal are the real ones; the engines are stand-ins that the host starts with vLLM's command
line, and stable's takes `--restart-seconds` to come back (a real one takes 30 to 100). Users ask all the time, each
under sticky keys of their own. In each half: `kill -9` of stable's engine, until it serves again. The last line is
JSON. Per policy: requests, lost (not answered with 200), outage_seconds (from the kill to the end of the last lost
answer), first_seconds (to the first answer by another engine); then `previous`'s share of `wait`'s losses.
"""

import argparse
import http.client
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from busy_users import Users
from serving_place import place_class

from mansard.release.journal import Journal
from mansard.serving.client import HostClient
from mansard.site import Site, load_site

POLICIES = ("wait", "previous")
PAUSE_SECONDS = 0.02
"""Of a user between two requests."""
KEYS_PER_USER = 10


Answer = tuple[float, float, int, str]
"""Begin, end, status, version."""


def users_of(port: int, num_users: int, model: str = "demo") -> Users[Answer]:
    """Each has sticky keys of its own and asks on a new connection."""
    body = json.dumps({"model": model, "prompt": "x", "max_tokens": 4}).encode()

    def ask(user: int, turn: int) -> Answer:
        begin = time.monotonic()
        status, version = _ask(port, body, f"user-{user}-{turn % KEYS_PER_USER}")
        return begin, time.monotonic(), status, version

    return Users(ask, num_users, PAUSE_SECONDS)


def _ask(port: int, body: bytes, key: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        headers = {"content-type": "application/json", "x-mansard-session": key}
        connection.request("POST", "/v1/completions", body, headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status, answer.getheader("x-mansard-version") or ""
    except (OSError, http.client.HTTPException):
        return 599, ""
    finally:
        connection.close()


def serve_two(place: Any, restart_seconds: float) -> None:
    """Version 2 is stable, version 1 warm beside it."""
    slow = {"slow_once": str(place.home / "slow"), "start_seconds": restart_seconds}
    for behaviour in ({"voice": "one"}, {"voice": "two", **slow}):
        version = place.register(**behaviour)
        with Journal.open(place.site.journal) as journal:  # a rollout needs traffic; this is what it would have written
            journal.start_rollout("demo", version, "ada", "", journal.pointers("demo"))
            journal.promote("demo", version, "host", "", journal.pointers("demo"))
        place.wait_for(f"version {version}", lambda version=version: place.ask() == (200, str(version)))
    place.wait_for("both engines", lambda: all(v.endpoint for v in place.split().versions.values()))


def measure(policy: str, num_users: int, restart_seconds: float) -> dict[str, Any]:
    """Kill stable's engine under load; until it serves again."""
    home = Path(tempfile.mkdtemp(prefix="mansard-"))
    place = place_class()(home)
    users = users_of(place.site.ports.router, num_users)
    try:
        place.site.path.write_text(
            json.dumps({**json.loads(place.site.path.read_text()), "when_stable_is_dead": policy})
        )
        place.site = load_site(place.site.path)
        place.start_host()
        place.start_router()
        serve_two(place, restart_seconds)
        users.start()
        place.wait_for("load", lambda: len(users.answers) > 50 * num_users)
        engine = place.engine_of(2)["pid"]
        killed = time.monotonic()
        os.kill(engine, signal.SIGKILL)
        place.wait_for("stable's return", lambda: _num_returns(place.site, "demo") > 0)
        place.wait_for("version 2", lambda: users.answers[-1][3] == "2" and users.answers[-1][2] == 200)
    finally:
        users.stop()
        place.close()
        shutil.rmtree(home)
    return figures(users.answers, killed)


def measure_running(site: Site, model: str, num_users: int, deadline_seconds: float = 900) -> dict[str, Any]:
    """The same on a stack that runs."""
    with Journal.open(site.journal) as journal:
        stable = journal.pointers(model).stable
        artifact = journal.registration(model, stable).artifact if stable is not None else None
    engines = HostClient(site.host_socket).call("GET", "/status")["engines"]
    pids = [engine["pid"] for engine in engines if engine["artifact"] == artifact]
    if len(pids) != 1:
        raise SystemExit(f"outage: stable of {model!r} has {len(pids)} engines; needs one that serves")
    returns = _num_returns(site, model)
    users = users_of(site.ports.router, num_users, model)
    users.start()
    try:
        _wait(lambda: len(users.answers) > 20 * num_users, deadline_seconds)
        killed = time.monotonic()
        os.kill(pids[0], signal.SIGKILL)
        _wait(lambda: _num_returns(site, model) > returns, deadline_seconds)
        back = time.monotonic()
        _wait(lambda: users.answers[-1][3] == str(stable), deadline_seconds)
    finally:
        users.stop()
    by = sorted({version for _, _, status, version in users.answers if status == 200})
    return figures(users.answers, killed) | {"engine_seconds": round(back - killed, 1), "answered_by": by}


def _wait(is_met: Callable[[], bool], deadline_seconds: float) -> None:
    deadline = time.monotonic() + deadline_seconds
    while not is_met():
        if time.monotonic() > deadline:
            raise SystemExit(f"outage: not there after {deadline_seconds:.0f} s; see mansard status")
        time.sleep(0.2)


def _num_returns(site: Site, model: str) -> int:
    with Journal.open(site.journal) as journal:
        return len(journal.entries(model, kinds=("stable_up",)))


def figures(answers: list[Answer], killed: float) -> dict[str, Any]:
    lost = [end for _, end, status, _ in answers if status != 200]
    first = [end for begin, end, status, _ in answers if status == 200 and begin > killed]
    return {
        "requests": len(answers),
        "lost": len(lost),
        "outage_seconds": round(max(lost, default=killed) - killed, 3),
        "first_seconds": round(min(first) - killed, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--restart-seconds", type=float, default=20.0)
    parser.add_argument("--site", type=Path, help="a running stack's site file")
    parser.add_argument("--model", default="demo")
    options = parser.parse_args()
    if options.site is not None:
        site = load_site(options.site)
        print(json.dumps({"policy": site.when_stable_is_dead, **measure_running(site, options.model, options.users)}))
        return
    measured = {}
    for policy in POLICIES:
        measured[policy] = measure(policy, options.users, options.restart_seconds)
        facts = measured[policy]
        print(f"{policy}: {facts['lost']} of {facts['requests']} requests lost, {facts['outage_seconds']} s")
    share = measured["previous"]["lost"] / max(measured["wait"]["lost"], 1)
    print(json.dumps({"restart_seconds": options.restart_seconds, **measured, "lost_share_of_wait": round(share, 4)}))


if __name__ == "__main__":
    main()
