"""A rig: a real router worker process in front of real processes that stand in for engines.

Test modules cannot import this file, so what they need are methods of the rig.
"""

import contextlib
import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mansard.serving.client import HostClient
from mansard.serving.split import (
    Split,
    with_canary,
    with_stable,
    write_split,
)

ROOT = Path(__file__).resolve().parents[4]
ENGINE = ROOT / "tests/benchmarks/instant_engine.py"
DEADLINE_SECONDS = 60.0
SITE = """
format: 1
home: home
data: data
models: [tiny]
environments: {main: {python: /usr/bin/env, lock: none}, serve: {python: /usr/bin/env, lock: none}}
stages: {default: main}
ports: {router: 0}
"""
SHOWN = "router: {show_version: always}\n"
SITE += SHOWN


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {DEADLINE_SECONDS} s for {what}"
        time.sleep(0.005)  # between two looks at the condition


@contextlib.contextmanager
def process(*command: str) -> Iterator[tuple["subprocess.Popen[bytes]", dict[str, Any]]]:
    """A child that prints one JSON line when it is ready; it and its own children end with the context."""
    with subprocess.Popen(
        [sys.executable, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    ) as child:
        try:
            assert child.stdout is not None
            line = child.stdout.readline()
            assert line, f"{command} ended without a word"
            yield child, json.loads(line)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def version(self) -> str | None:
        return self.headers.get("x-mansard-version")

    @property
    def text(self) -> str:
        """Who answered, in its own words."""
        return str(json.loads(self.body)["choices"][0]["text"])


def call(
    port: int, path: str = "/v1/completions", body: bytes | None = None, method: str = "POST", **headers: str
) -> Reply:
    """One request on a connection of its own; underscores in header names become dashes."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_SECONDS)
    with contextlib.closing(connection):
        data = b'{"model": "tiny", "prompt": "x"}' if body is None and method == "POST" else body
        connection.request(method, path, data, {k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())


def received(client: socket.socket) -> bytes:
    """All until the other side closes."""
    return b"".join(iter(lambda: client.recv(65536), b""))


STREAM = b'{"model": "tiny", "prompt": "x", "stream": true}'


@contextlib.contextmanager
def stream(port: int, **headers: str) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_SECONDS)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/completions", STREAM, {k.replace("_", "-"): v for k, v in headers.items()})
        with contextlib.closing(connection.getresponse()) as answer:
            yield answer


@dataclass
class Engine:
    port: int
    process: "subprocess.Popen[bytes]"

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def behave(self, **behaviour: object) -> None:
        assert call(self.port, "/_control", json.dumps(behaviour).encode()).status == 200

    def seen(self) -> dict[str, Any]:
        return dict(json.loads(call(self.port, "/_seen", method="GET").body))


@dataclass
class Rig:
    """A site, its worker, and two engines: version 1 stable, version 2 canary."""

    home: Path
    port: int
    one: Engine
    two: Engine
    worker: "subprocess.Popen[bytes]"
    terms: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def write(self, canary_percent: int | None) -> Split:
        """A split of a new term, in force when this returns."""
        term = next(self.terms)
        split = with_stable(Split(), "tiny", 1, self.one.endpoint, "tiny", term)
        if canary_percent is not None:
            split = with_canary(split, "tiny", 2, self.two.endpoint, "tiny", canary_percent, term)
        self.put(split)
        return split

    def put(self, split: Split) -> None:
        write_split(self.home / "split.json", split)
        wait_until(lambda: self.seen()["term"] == split.term, f"term {split.term}")

    def call(self, *arguments: Any, **headers: Any) -> Reply:
        return call(self.port, *arguments, **headers)

    def stream(self, **headers: str) -> contextlib.AbstractContextManager[http.client.HTTPResponse]:
        return stream(self.port, **headers)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), DEADLINE_SECONDS)

    def again(self) -> contextlib.AbstractContextManager[Any]:
        """Another worker process with the same command line."""
        command = self.worker.args
        assert isinstance(command, list)
        return process(*command[1:])

    def wait_until(self, condition: Callable[[], object], what: str) -> None:
        wait_until(condition, what)

    def engine(self, name: str) -> contextlib.AbstractContextManager[Engine]:
        return engine(name)

    def seen(self, index: int = 0) -> dict[str, Any]:
        return HostClient(self.home / f"run/router-{index}.sock").call("GET", "/observations")

    def records(self, after: int = 0) -> dict[str, Any]:
        return HostClient(self.home / "run/router-0.sock").call("GET", f"/records?after={after}")

    def counts(self, version: int) -> dict[str, Any]:
        versions = self.seen()["models"].get("tiny", {"versions": {}})["versions"]
        return dict(versions.get(str(version), dict.fromkeys(("requests", "ok", "errors", "rescues", "engine_4xx"), 0)))


@contextlib.contextmanager
def engine(name: str) -> Iterator[Engine]:
    with process(str(ENGINE), "--name", name) as (child, ready):
        yield Engine(ready["port"], child)


@contextlib.contextmanager
def rig_in(folder: Path, *arguments: str, site: str = SITE, module: str = "router.worker") -> Iterator[Rig]:
    (folder / "site.yaml").write_text(site)
    worker = ("-m", f"mansard.serving.{module}", "--site", str(folder / "site.yaml"), *arguments)
    with engine("one") as one, engine("two") as two, process(*worker) as (child, ready):
        yield Rig(folder / "home", ready["port"], one, two, child)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Shorter than pytest's own, which pytest-xdist lengthens: HAProxy takes socket paths of 97 bytes."""
    with tempfile.TemporaryDirectory(prefix="router-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig_in(tmp_path_factory.mktemp("rig")) as rig:
        yield rig


@pytest.fixture
def rig(shared: Rig) -> Rig:
    """The shared rig with healthy engines."""
    for each in (shared.one, shared.two):
        each.behave(fail="none", delay_ms=0, interval_ms=0, tokens=16)
    return shared


@pytest.fixture
def make_rig(tmp_path: Path) -> Callable[..., contextlib.AbstractContextManager[Rig]]:
    """make_rig("--argument", site_lines="key: value") is a context manager with a worker of its own.

    With module="router.supervisor" it has several.
    """

    def make(
        *arguments: str, site_lines: str = "", module: str = "router.worker", port: int = 0
    ) -> contextlib.AbstractContextManager[Rig]:
        site = SITE.replace("router: 0", f"router: {port}") + site_lines
        if "router:" in site_lines:
            site = site.replace(SHOWN, "")
        return rig_in(tmp_path, *arguments, site=site, module=module)

    return make
