"""A whole serving place in a short folder: site, keys, store, journal, the real host and router worker processes.

Only the engine is a stand-in (fake_vllm, found through the site's environment variables): the host starts it with the
same command line as vLLM and talks to it over the same API.
"""

import http.client
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from mansard.canonical import canonical_json
from mansard.errors import MansardError
from mansard.evaluation.fingerprint import take
from mansard.records import Registration
from mansard.release.approval import approve, sign_registration
from mansard.release.journal import Journal
from mansard.release.keys import generate_key
from mansard.serving.client import HostClient
from mansard.serving.split import ModelSplit, read_split
from mansard.site import Site, load_site
from mansard.site_sections import Environment
from mansard.store.store import Store
from tests.free_ports import free_port

ROOT = Path(__file__).resolve().parents[3]
FAKE_VLLM = Path(__file__).parent / "fake_vllm"
PROMPTS = ["def add(a, b):", "import os"]
DEADLINE_SECONDS = 120.0
LIMITS = {"max_error_excess": 0.02, "latency_tolerance": 50.0, "output_tolerance": 2.0}
"""A tester's machine is shared: stand-ins differ in speed for no fault of theirs."""
RATIOS = {"first_token_ms_p50": 1.0, "per_token_ms_p50": 1.0, "request_ms_p50": 1.0}
USERS_PER_THREAD = 60
"""Enough that 30 users are on either side at 50 %."""
RELEASE = {
    "steps": [
        {"weight_percent": 50, "bake_seconds": 0.2, "min_requests": 10, "deadline_seconds": 90},
        {"weight_percent": 100, "bake_seconds": 0.2, "min_requests": 10, "deadline_seconds": 90},
    ],
    **LIMITS,
}

T = TypeVar("T")


def wait_for(what: str, found: Callable[[], T], seconds: float = DEADLINE_SECONDS) -> T:
    """What `found` returns once it is true."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.02)
    return value


@dataclass
class Traffic:
    """Users who ask the router all the time until `stop`."""

    port: int
    statuses: list[int] = field(default_factory=list)
    versions: list[str | None] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _turns: list[int] = field(default_factory=list)

    def start(self, num_threads: int = 2) -> None:
        """Once the first answer is there (the host says "promoted" a moment before a data plane has read the split);
        returns when enough users had one, because a release counts who asked lately."""
        wait_for("the first answer", lambda: ask(self.port)[0] == 200)
        self._stop.clear()
        self._turns = [0] * max(num_threads, 2)
        for number in range(num_threads):
            thread = threading.Thread(target=self._run, args=(number,))
            thread.start()
            self._threads.append(thread)
        enough = 2 * USERS_PER_THREAD
        wait_for("users", lambda: sum(min(turns, USERS_PER_THREAD) for turns in self._turns) >= enough)

    def _run(self, number: int) -> None:
        for turn in itertools.count():
            if self._stop.is_set():
                return
            status, version, _ = ask(self.port, f"user-{number}-{turn % USERS_PER_THREAD}", is_streamed=turn % 2 == 0)
            self.statuses.append(status)
            self.versions.append(version)
            self._turns[number] = turn + 1

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._threads = []


def ask(
    port: int, user: str = "user-0", is_streamed: bool = False, max_tokens: int = 4
) -> tuple[int, str | None, bytes]:
    """One completion through the router: status (599 for a broken answer), x-mansard-version, body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"model": "demo", "prompt": "x = ", "max_tokens": max_tokens, "stream": is_streamed}
    try:
        headers = {"content-type": "application/json", "x-mansard-session": user}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        text = answer.read()
        is_whole = not is_streamed or answer.status != 200 or text.rstrip().endswith(b"data: [DONE]")
        return answer.status if is_whole else 599, answer.getheader("x-mansard-version"), text
    except (OSError, http.client.HTTPException):
        return 599, None, b""
    finally:
        connection.close()


class Place:
    """The site and what runs on it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.site = self._make_site()
        self.store = Store(self.site.store)
        self.serve: dict[str, Any] = {}
        self.client = HostClient(self.site.host_socket)
        self.host: subprocess.Popen[bytes] | None = None
        self.router: subprocess.Popen[bytes] | None = None
        self._processes: list[subprocess.Popen[bytes]] = []

    def _make_site(self) -> Site:
        bare = Site(self.home / "site.yaml", self.home, self.home, ("demo",), {"m": Environment(ROOT, ROOT)}, {})
        roles = {"ada": ["author", "operator"], "grace": ["reviewer", "operator"], "otto": ["operator"]}
        for name in roles:
            generate_key(name, bare)
        python = {"python": sys.executable, "lock": str(ROOT / "infra/constraints/main.txt")}
        tree = {
            "format": 1,
            "home": ".",
            "data": "data",
            "models": ["demo"],
            "environments": {"main": python, "serve": {**python, "variables": {"PYTHONPATH": str(FAKE_VLLM)}}},
            "stages": {"default": "main"},
            "ports": {"router": free_port(), "engines_from": free_port()},
            "engine": {"environment": "serve", "cores": ["0", "1"], "start_timeout_seconds": 60},
            "router": {"show_version": "always"},
            "people": {n: {"roles": r, "public_key": f"keys/{n}.pub"} for n, r in roles.items()},
        }
        bare.path.write_text(json.dumps(tree))
        return load_site(bare.path)

    # Processes

    def start_host(self) -> None:
        self.host = self._start("host.log", "-m", "mansard.serving.host.host", "--site", str(self.site.path))
        wait_for("the host", lambda: self._answers(self.client))

    def start_host_script(self, script: Path, *words: object) -> None:
        """A host that a test had changed: `script SITE WORDS...`."""
        self.host = self._start("host.log", str(script), str(self.site.path), *map(str, words))
        wait_for("the host", lambda: self._answers(self.client))

    def start_router(self) -> None:
        self.router = self._start("router.log", "-m", "mansard.serving.router.worker", "--site", str(self.site.path))
        admin = HostClient(self.site.run / "router-0.sock")
        wait_for("the router", lambda: self._answers(admin, "/observations"))

    def start_supervisor(self) -> "subprocess.Popen[bytes]":
        """The router with all its workers; the caller ends it."""
        supervisor = self._start("router.log", "-m", "mansard.serving.router.supervisor", "--site", str(self.site.path))
        for index in range(self.site.router.workers):
            admin = HostClient(self.site.run / f"router-{index}.sock")
            wait_for("a router worker", lambda admin=admin: self._answers(admin, "/observations"))
        return supervisor

    def _start(self, log: str, *words: str) -> "subprocess.Popen[bytes]":
        with (self.home / log).open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, *words],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                cwd=self.home,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        self._processes.append(process)
        return process

    @staticmethod
    def _answers(client: HostClient, path: str = "/status") -> bool:
        try:
            client.call("GET", path)
        except MansardError:
            return False
        return True

    def end_host(self, number: signal.Signals) -> None:
        assert self.host is not None
        self.host.send_signal(number)
        self.host.wait(DEADLINE_SECONDS)
        self.host = None

    def close(self) -> None:
        """End everything; engines by SIGTERM to a host, started anew where the test killed it."""
        if self.host is None or self.host.poll() is not None:
            self.start_host()
        self.end_host(signal.SIGTERM)
        for process in self._processes:
            process.kill()
            process.wait()

    # Questions

    wait_for = staticmethod(wait_for)

    def status(self) -> dict[str, Any]:
        return self.client.call("GET", "/status")

    def rollout(self) -> dict[str, Any]:
        return self.client.call("GET", "/rollouts/demo")

    def split(self) -> ModelSplit:
        return read_split(self.site.split_file).models["demo"]

    def engine_of(self, version: int) -> dict[str, Any]:
        with Journal.open(self.site.journal) as journal:
            artifact = journal.registration("demo", version).artifact
        found = [e for e in self.status()["engines"] if e["artifact"] == artifact]
        assert len(found) == 1, f"one engine of version {version}, not {found}"
        return found[0]

    def ask_long(self, user: str = "user-0") -> tuple[int, str | None, bytes]:
        """A stream of a thousand tokens."""
        return ask(self.site.ports.router, user, is_streamed=True, max_tokens=1000)

    def ask_as_users(self, number: int = 120) -> None:
        """So many users ask once: enough for a release at 50 %."""
        assert {self.ask(f"user-0-{user}")[0] for user in range(number)} == {200}

    def ask(self, user: str = "user-0") -> tuple[int, str | None]:
        return ask(self.site.ports.router, user)[:2]

    # Versions

    def artifact(self, **behaviour: Any) -> str:
        return self.store.put_files({"behaviour.json": canonical_json(behaviour)})

    def start_engine(self, artifact: str) -> dict[str, Any]:
        body = {"model": "demo", "artifact": artifact, "serve": self.serve, "wait": True}
        return self.client.call("POST", "/engines", body, timeout_seconds=self.site.engine.start_timeout_seconds)

    def register(
        self,
        release: dict[str, Any] = RELEASE,
        fingerprint: str | None = None,
        ratios: dict[str, float] | None = RATIOS,
        artifact: str | None = None,
        **behaviour: Any,
    ) -> int:
        """A version whose fingerprint was taken from its own engine, as evaluation does; `ratios` are its cost's."""
        artifact = artifact or self.artifact(**behaviour)
        spec = {"prompts": PROMPTS, "tokens": 4, "tolerance": 0.1}
        if fingerprint is None:
            endpoint = self.start_engine(artifact)["endpoint"]
            taken = take(endpoint, "demo", PROMPTS, 4)
            fingerprint = self.store.put_files({"fingerprint.json": canonical_json(taken.as_json())})
        lineage = {"stage": "fingerprint", "recipe": "f" * 64, "spec": {"fingerprint": spec}}
        self.store.remember("f" * 64, fingerprint, lineage)
        record = self.store.put_files({"verdict.json": b"{}"})
        cost = self.store.put_files(
            {"cost.json": canonical_json({"format": 1, **({"ratio": ratios} if ratios else {})})}
        )
        with Journal.open(self.site.journal) as journal:
            stable = journal.pointers("demo").stable
            registration = Registration(
                model_name="demo",
                model=artifact,
                artifact=artifact,
                verdict="baseline" if stable is None else "pass",
                verdict_record=record,
                fingerprint=fingerprint,
                item_records=(),
                base_version=stable,
                baseline_version=stable,
                anchor_version=stable,
                author="ada",
                spec_name="demo",
                spec_digest="5" * 64,
                serve=self.serve,
                release=release,
                stages=(("fingerprint", "f" * 64, fingerprint), ("cost", "c" * 64, cost)),
            )
            return journal.register(registration, sign_registration(self.site, registration))

    def approve(self, version: int) -> None:
        with Journal.open(self.site.journal) as journal:
            approve(self.site, journal, self.store, "demo", version, "grace", "looks good")

    def judged_against_stable(self, version: int) -> None:
        """The same version judged again against today's stable."""
        with Journal.open(self.site.journal) as journal:
            stable = journal.pointers("demo").stable
            again = replace(journal.registration("demo", version), baseline_version=stable)
            journal.judge(version, again, sign_registration(self.site, again), "ada", "the baseline moved")

    def start_rollout(self, version: int) -> dict[str, Any]:
        return self.client.call(
            "POST", "/rollouts", {"model": "demo", "version": version, "who": "ada", "why": "release"}
        )

    def wait_for_end(self) -> dict[str, Any]:
        return wait_for("the rollout's end", lambda: (r := self.rollout())["state"] in ("promoted", "aborted") and r)

    def release(self, version: int) -> dict[str, Any]:
        """Approve and release; returns how the rollout ended."""
        self.approve(version)
        self.start_rollout(version)
        return self.wait_for_end()

    def roll_back(self, **more: Any) -> dict[str, Any]:
        body = {"model": "demo", "who": "otto", "why": "night", **more}
        return self.client.call("POST", "/rollback", body, timeout_seconds=DEADLINE_SECONDS)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A place without processes; the folder is short because a socket's path has at most 107 bytes."""
    monkeypatch.delenv("MANSARD_KEYS", raising=False)
    home = Path(tempfile.mkdtemp(prefix="mansard-"))
    place = Place(home)
    try:
        yield place
    finally:
        place.close()
        shutil.rmtree(home)


@pytest.fixture(scope="module")
def shared() -> Iterator[Place]:
    """A place with a host, for tests that change nothing."""
    home = Path(tempfile.mkdtemp(prefix="mansard-"))
    place = Place(home)
    try:
        place.start_host()
        yield place
    finally:
        place.close()
        shutil.rmtree(home)


@pytest.fixture
def traffic(place: Place) -> Iterator[Traffic]:
    """Users of `place`; started by the test."""
    users = Traffic(place.site.ports.router)
    yield users
    users.stop()
