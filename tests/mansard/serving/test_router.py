"""A real router worker process in front of real processes that stand in for engines."""

import contextlib
import hashlib
import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mansard.serving.host_client import HostClient, router_observations
from mansard.serving.split import (
    Split,
    bucket_of,
    read_split,
    renewed,
    split_bytes,
    with_canary,
    with_endpoint,
    with_stable,
    without_canary,
    write_split,
)
from mansard.site import load_site

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
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


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {DEADLINE_SECONDS} s for {what}"
        time.sleep(0.005)  # between two looks at the condition


@contextlib.contextmanager
def process(*command: str) -> Iterator[tuple["subprocess.Popen[bytes]", dict[str, Any]]]:
    """A child that prints one JSON line when it is ready."""
    with subprocess.Popen(
        [sys.executable, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as child:
        try:
            assert child.stdout is not None
            line = child.stdout.readline()
            assert line, f"{command} ended without a word"
            yield child, json.loads(line)
        finally:
            child.kill()


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

    def seen(self) -> dict[str, Any]:
        return HostClient(self.home / "run/router-0.sock").call("GET", "/observations")

    def counts(self, version: int) -> dict[str, Any]:
        versions = self.seen()["models"].get("tiny", {"versions": {}})["versions"]
        return dict(versions.get(str(version), dict.fromkeys(("requests", "ok", "errors", "rescues", "engine_4xx"), 0)))


@contextlib.contextmanager
def engine(name: str) -> Iterator[Engine]:
    with process(str(ENGINE), "--name", name) as (child, ready):
        yield Engine(ready["port"], child)


@contextlib.contextmanager
def rig_in(folder: Path, *arguments: str, site: str = SITE) -> Iterator[Rig]:
    (folder / "site.yaml").write_text(site)
    worker = ("-m", "mansard.serving.router_worker", "--site", str(folder / "site.yaml"), *arguments)
    with engine("one") as one, engine("two") as two, process(*worker) as (child, ready):
        yield Rig(folder / "home", ready["port"], one, two, child)


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


def key_of(is_canary: bool, percent: int) -> str:
    """A session that the split puts on the wanted side (see sticky_key)."""
    keys = (f"user-{i}" for i in itertools.count())
    return next(k for k in keys if (bucket_of("tiny", f"/x-mansard-session/{k}") < percent * 100) == is_canary)


def test_a_session_stays_with_its_version_and_the_answer_says_which(rig: Rig) -> None:
    rig.write(50)
    for is_canary, number, name in ((True, "2", "two"), (False, "1", "one")):
        replies = [call(rig.port, x_mansard_session=key_of(is_canary, 50)) for _ in range(3)]
        assert [(r.status, r.version, r.text) for r in replies] == [(200, number, name)] * 3
        assert {r.headers["x-mansard-model"] for r in replies} == {"tiny"}


def test_the_share_of_sessions_follows_the_weight_and_only_grows(rig: Rig) -> None:
    canary: list[set[int]] = []
    for percent in (0, 10, 50, 100):
        rig.write(percent)
        replies = {i: call(rig.port, x_user_id=f"u{i}") for i in range(60)}
        canary.append({i for i, reply in replies.items() if reply.version == "2"})
    assert canary[0] < canary[1] < canary[2] < canary[3] == set(range(60))


def test_a_tester_pins_a_resident_version_and_no_other(rig: Rig) -> None:
    rig.write(0)
    assert call(rig.port, x_mansard_version="2").text == "two"
    assert call(rig.port, x_mansard_version="1").text == "one"
    assert (call(rig.port, x_mansard_version="3").status, call(rig.port, x_mansard_version="v2").status) == (404, 400)


def test_a_stream_arrives_event_by_event_and_unchanged(rig: Rig) -> None:
    rig.write(None)
    rig.one.behave(fail="hang-after-two")
    before = rig.counts(1)["requests"]
    with stream(rig.port) as answer:
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["x-mansard-version"] == "1"
        assert b'"one"' in answer.readline()  # there while the engine has not ended the stream
        assert rig.counts(1)["in_flight"] == 1
        rig.one.behave(fail="none")
        rest = answer.read()
    assert rest.count(b"data: ") == 16
    assert rest.endswith(b"data: [DONE]\n\n")
    wait_until(lambda: rig.counts(1)["requests"] == before + 1, "the count")


@pytest.mark.parametrize("fail", ["refuse", "error500", "error-first", "die-before-event"])
@pytest.mark.parametrize("body", [STREAM, None])
def test_a_failing_canary_is_rescued_by_stable_and_pays_for_it(rig: Rig, fail: str, body: bytes | None) -> None:
    if body is None and fail in ("error-first", "die-before-event"):
        pytest.skip("for streams only")
    rig.write(100)
    rig.two.behave(fail=fail)
    before = rig.counts(2)
    reply = call(rig.port, body=body)
    assert (reply.status, reply.version) == (200, "1")
    assert b"one" in reply.body
    after = rig.counts(2)
    assert (after["errors"] - before["errors"], after["rescues"] - before["rescues"]) == (1, 1)
    assert after["consecutive_failures"] >= 1


def test_a_dead_engine_is_rescued_and_consecutive_failures_end_with_a_success(rig: Rig) -> None:
    split = rig.write(100)
    with engine("three") as three:
        rig.put(with_canary(split, "tiny", 3, three.endpoint, "tiny", 100, next(rig.terms)))
        assert call(rig.port).text == "three"
        three.process.kill()
        three.process.wait()
        for expected in (1, 2, 3):
            assert call(rig.port).text == "one"
            assert rig.counts(3)["consecutive_failures"] == expected
    with engine("three again") as three:
        rig.put(with_canary(split, "tiny", 3, three.endpoint, "tiny", 100, next(rig.terms)))
        assert call(rig.port).text == "three again"
    assert rig.counts(3)["consecutive_failures"] == 0


def test_a_pinned_request_is_not_rescued(rig: Rig) -> None:
    rig.write(0)
    rig.two.behave(fail="error500")
    reply = call(rig.port, x_mansard_version="2")
    assert (reply.status, reply.version) == (500, "2")
    rig.two.behave(fail="refuse")
    reply = call(rig.port, x_mansard_version="2")
    assert (reply.status, reply.headers["retry-after"]) == (503, "2")


def test_nobody_left_to_ask_is_503_with_retry_after(rig: Rig) -> None:
    rig.write(100)
    rig.one.behave(fail="refuse")
    rig.two.behave(fail="refuse")
    reply = call(rig.port)
    assert (reply.status, reply.headers["retry-after"]) == (503, "2")
    rig.put(with_endpoint(with_stable(Split(), "tiny", 1, None, "tiny", next(rig.terms)), "tiny", 1, None, "tiny"))
    assert call(rig.port).status == 503
    assert call(rig.port, "/health", method="GET").status == 503


def test_an_engine_that_dies_under_way_ends_the_stream_with_an_error_event(rig: Rig) -> None:
    rig.write(None)
    rig.one.behave(fail="die-mid-stream")
    before = rig.counts(1)["errors"]
    reply = call(rig.port, body=STREAM)
    *events, last = reply.body.strip().split(b"\n\n")
    error = json.loads(last.removeprefix(b"data: "))["error"]
    assert (len(events), error["type"], error["code"]) == (2, "engine_failed", 502)
    assert b"[DONE]" not in reply.body
    assert rig.counts(1)["errors"] == before + 1


def test_a_client_that_goes_away_cancels_the_engines_work(rig: Rig) -> None:
    rig.write(None)
    rig.one.behave(fail="hang-after-two")
    cancelled = rig.one.seen()["cancelled"]
    with stream(rig.port) as answer:
        answer.readline()
    wait_until(lambda: rig.one.seen()["cancelled"] == cancelled + 1, "the stream's cancellation")
    rig.one.behave(fail="hang")
    with socket.create_connection(("127.0.0.1", rig.port)) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}")
        wait_until(lambda: rig.one.seen()["in_flight"] == 1, "the request at the engine")
    wait_until(lambda: rig.one.seen()["cancelled"] == cancelled + 2, "the cancellation before the first byte")
    wait_until(lambda: rig.counts(1)["in_flight"] == 0, "the router to forget")
    assert rig.counts(1)["cancelled"] >= 2


def test_an_accepted_stream_outlives_the_split_that_chose_its_engine(rig: Rig) -> None:
    rig.write(100)
    rig.two.behave(fail="hang-after-two")
    with stream(rig.port) as answer:
        assert b'"two"' in answer.readline()
        rig.put(without_canary(read_split(rig.home / "split.json"), "tiny", next(rig.terms)))
        assert call(rig.port).text == "one"
        rig.two.behave(fail="none")
        assert answer.read().endswith(b"data: [DONE]\n\n")


def test_an_engines_4xx_passes_through_and_is_counted_apart(rig: Rig) -> None:
    rig.write(100)
    rig.two.behave(fail="error400")
    before = rig.counts(2)
    assert (call(rig.port).status, call(rig.port).version) == (400, "2")
    after = rig.counts(2)
    assert (after["errors"], after["engine_4xx"]) == (before["errors"], before["engine_4xx"] + 2)


@pytest.mark.parametrize(
    "target",
    [
        *("/pooling", "/update_weights", "/pause", "/metrics", "/observations", "/_seen", "/", "*"),
        *(
            "//v1/completions",
            "/v1/completions/",
            "/v1/%63ompletions",
            "/v1/../pooling",
            "http://127.0.0.1/v1/completions",
        ),
    ],
)
def test_other_paths_never_reach_an_engine(rig: Rig, target: str) -> None:
    rig.write(None)
    before, counts = rig.one.seen()["requests"], rig.counts(1)
    assert call(rig.port, target).status in (400, 404)
    assert call(rig.port, "/v1/completions", method="GET").status == 405
    assert (rig.one.seen()["requests"], rig.counts(1)) == (before, counts)


@pytest.mark.parametrize(
    "head",
    [
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length : 2\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx: a\r\n b\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 20_000 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 40 + b"\r\n\r\n",
    ],
    ids=["two lengths", "length and chunked", "space before colon", "folded", "huge", "TLS"],
)
def test_malformed_requests_get_400_and_reach_nobody(rig: Rig, head: bytes) -> None:
    rig.write(None)
    before = rig.one.seen()["requests"]
    with socket.create_connection(("127.0.0.1", rig.port), DEADLINE_SECONDS) as client:
        client.sendall(head)
        answer, _, body = received(client).partition(b"\r\n\r\n")
        assert answer.startswith((b"HTTP/1.0 400", b"HTTP/1.1 400"))
        assert b"aiohttp" not in answer
        assert json.loads(body)["error"]["message"] == "not a well-formed HTTP request"
    assert rig.one.seen()["requests"] == before


def test_an_engine_gets_the_body_as_it_was_and_no_credentials(rig: Rig) -> None:
    rig.write(None)
    body = json.dumps({"prompt": "ä" * 100_000, "model": "tiny"}, ensure_ascii=False).encode()
    headers = {"authorization": "Bearer secret", "cookie": "a=b", "x_request_id": "r1", "connection": "x-drop"}
    assert call(rig.port, "/v1/completions?a=b", body, **headers, x_drop="1", x_mansard_session="s").status == 200
    seen = rig.one.seen()
    assert seen["body"] == body.decode()[:10_000]
    assert seen["headers"]["content-length"] == str(len(body))
    assert seen["headers"]["x-request-id"] == "r1"
    assert not seen["headers"].keys() & {"authorization", "cookie", "x-drop", "x-mansard-session", "connection"}
    assert seen["paths"][-1] == "POST /v1/completions"


def test_a_chunked_body_is_taken_and_sent_on_whole(rig: Rig) -> None:
    rig.write(None)
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", rig.port, timeout=DEADLINE_SECONDS)) as client:
        client.request("POST", "/v1/completions", iter([b'{"prompt":', b' "x"}']), encode_chunked=True)
        with contextlib.closing(client.getresponse()) as answer:
            assert answer.status == 200
    assert (rig.one.seen()["body"], rig.one.seen()["headers"]["content-length"]) == ('{"prompt": "x"}', "15")


def test_a_lower_term_and_a_half_written_split_are_ignored(rig: Rig) -> None:
    split = rig.write(100)
    path = rig.home / "split.json"
    path.write_bytes(split_bytes(with_stable(Split(), "tiny", 1, rig.one.endpoint, "tiny", split.term - 1)))
    wait_until(lambda: "older" in (rig.seen()["split_problem"] or ""), "the older split to be noticed")
    assert call(rig.port).text == "two"
    path.write_bytes(split_bytes(split)[:50])
    wait_until(lambda: "not a whole JSON" in (rig.seen()["split_problem"] or ""), "the broken split to be noticed")
    assert call(rig.port).text == "two"
    rig.write(None)
    assert (rig.seen()["split_problem"], call(rig.port).text) == (None, "one")


def test_models_are_listed_and_chosen_by_the_bodys_model(rig: Rig) -> None:
    both = with_stable(rig.write(None), "other", 7, rig.two.endpoint, "other", next(rig.terms))
    rig.put(both)
    listed = json.loads(call(rig.port, "/v1/models", method="GET").body)["data"]
    assert [model["id"] for model in listed] == ["other", "tiny"]
    reply = call(rig.port, body=b'{"model": "other"}')
    assert (reply.text, reply.version, reply.headers["x-mansard-model"]) == ("two", "7", "other")
    assert call(rig.port).text == "one"
    assert [call(rig.port, body=b).status for b in (b'{"model": "none"}', b"{", b"[1]")] == [404, 400, 404]
    empty = Split(next(rig.terms), {})
    rig.put(empty)
    reply = call(rig.port)
    assert (reply.status, "retry-after" in reply.headers) == (503, True)


def test_metrics_speak_prometheus(rig: Rig) -> None:
    rig.write(None)
    call(rig.port, body=STREAM)
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as client:
        client.connect(str(rig.home / "run/router-0.sock"))
        client.sendall(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        text = received(client).decode()
    assert 'mansard_requests_total{model="tiny",outcome="ok",version="1"}' in text
    assert 'mansard_ttft_seconds_bucket{le="+Inf",model="tiny",version="1"}' in text
    assert (rig.home / "run/router-0.sock").stat().st_mode & 0o777 == 0o600


def test_a_canary_whose_lease_runs_out_serves_nobody_until_it_moves(tmp_path: Path) -> None:
    with rig_in(tmp_path, "--lease-seconds", "0.3") as rig:
        split = rig.write(100)
        wait_until(lambda: call(rig.port).version == "1", "the lease to run out")
        assert rig.seen()["models"]["tiny"]["has_lease"] is False
        pinned = call(rig.port, x_mansard_version="2")
        assert (pinned.status, "retry-after" in pinned.headers) == (503, True)

        def renew_and_ask() -> bool:
            nonlocal split
            split = renewed(split, "tiny")
            write_split(rig.home / "split.json", split)
            return call(rig.port).version == "2"

        wait_until(renew_and_ask, "the canary to be back")


def test_draining_finishes_streams_refuses_connections_and_exits_0(tmp_path: Path) -> None:
    with rig_in(tmp_path) as rig:
        rig.write(None)
        rig.one.behave(fail="hang-after-two")
        with stream(rig.port) as answer:
            answer.readline()
            rig.worker.send_signal(signal.SIGTERM)

            def is_closed() -> bool:
                with contextlib.closing(socket.socket()) as client:
                    return client.connect_ex(("127.0.0.1", rig.port)) != 0

            wait_until(is_closed, "the listener to close")
            assert router_observations(load_site(tmp_path / "site.yaml"))[0]["in_flight"] == 1
            rig.one.behave(fail="none")
            assert answer.read().endswith(b"data: [DONE]\n\n")
        assert rig.worker.wait(DEADLINE_SECONDS) == 0
        assert router_observations(load_site(tmp_path / "site.yaml")) == []


def test_draining_gives_up_at_its_deadline(tmp_path: Path) -> None:
    with rig_in(tmp_path, "--drain-seconds", "0.2") as rig:
        rig.write(None)
        rig.one.behave(fail="hang-after-two")
        with stream(rig.port) as answer:
            answer.readline()
            rig.worker.send_signal(signal.SIGTERM)
            assert rig.worker.wait(DEADLINE_SECONDS) == 0


def test_api_keys_are_asked_for_and_can_be_taken_back(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(f'acme: "{hashlib.sha256(b"k1").hexdigest()}"\nbeta: ["{hashlib.sha256(b"k2").hexdigest()}"]\n')
    with rig_in(tmp_path, site=SITE + "api_keys: keys.yaml\n") as rig:
        rig.write(None)
        asked = [
            call(rig.port, authorization=a).status for a in ("Bearer k1", "bearer k2", "Bearer k3", "Basic k1", "")
        ]
        assert asked == [200, 200, 401, 401, 401]
        assert call(rig.port).headers["www-authenticate"] == "Bearer"
        assert call(rig.port, "/health", method="GET").status == 200
        keys.write_text("acme: not a digest\n")
        assert call(rig.port, authorization="Bearer k1").status == 200
        keys.write_text(f'acme: "{hashlib.sha256(b"k9").hexdigest()}"\n')
        wait_until(lambda: call(rig.port, authorization="Bearer k1").status == 401, "the old key to be refused")
        assert call(rig.port, authorization="Bearer k9").status == 200
        assert rig.seen()["refused"]["401"] >= 5
        assert rig.counts(1)["errors"] == 0


def test_too_much_at_once_and_too_large_are_refused_at_once(tmp_path: Path) -> None:
    with rig_in(tmp_path, "--max-in-flight", "1", "--max-body-bytes", "100") as rig:
        rig.write(None)
        assert call(rig.port, body=b"x" * 101).status == 413
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", rig.port, timeout=DEADLINE_SECONDS)) as client:
            client.request("POST", "/v1/completions", iter([b"x" * 60, b"x" * 60]), encode_chunked=True)
            with contextlib.closing(client.getresponse()) as answer:
                assert answer.status == 413
        rig.one.behave(fail="hang-after-two")
        with stream(rig.port) as answer:
            answer.readline()
            busy = call(rig.port)
            assert (busy.status, busy.headers["retry-after"]) == (429, "2")
        wait_until(lambda: rig.seen()["in_flight"] == 0, "the stream to end")
        rig.one.behave(fail="none")
        assert call(rig.port).status == 200


def test_a_taken_port_and_a_taken_index_end_with_one_line(tmp_path: Path) -> None:
    with rig_in(tmp_path) as rig:
        for port, code, words in ((rig.port, 2, "name a free port"), (0, 7, "choose another --index")):
            other = tmp_path / "other.yaml"
            other.write_text(SITE.replace("router: 0", f"router: {port}"))
            command = [sys.executable, "-m", "mansard.serving.router_worker", "--site", str(other)]
            ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=DEADLINE_SECONDS)
            assert (ended.returncode, ended.stderr.count("\n")) == (code, 1)
            assert words in ended.stderr
