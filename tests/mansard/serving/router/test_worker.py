"""The router worker as a process: its lease clock, draining, keys, limits, sockets."""

import contextlib
import hashlib
import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mansard.serving.client import UnixConnection, router_observations
from mansard.serving.split import Split, renewed, with_stable, write_split
from mansard.serving.worker_splits import lag_lines, lagging_workers
from mansard.site import load_site

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[4]
STREAM = b'{"model": "tiny", "prompt": "x", "stream": true}'
DEADLINE_SECONDS = 60.0


def received(client: socket.socket) -> bytes:
    """All until the other side closes."""
    return b"".join(iter(lambda: client.recv(65536), b""))


def metrics_of(rig: Any) -> str:
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as client:
        client.connect(str(rig.home / "run/router-0.sock"))
        client.sendall(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        return received(client).decode()


def test_metrics_speak_prometheus(rig: Any) -> None:
    rig.write(None)
    rig.call(body=STREAM)
    text = metrics_of(rig)
    assert 'mansard_requests_total{model="tiny",outcome="ok",version="1",worker="0"}' in text
    for name in ("ttft", "token", "latency"):
        assert f'mansard_{name}_seconds_bucket{{le="+Inf",model="tiny",version="1",worker="0"}}' in text
    assert (rig.home / "run/router-0.sock").stat().st_mode & 0o777 == 0o600


def test_a_canary_whose_lease_runs_out_serves_nobody_until_it_moves(tmp_path: Path, make_rig: Any) -> None:
    with make_rig("--lease-seconds", "0.3") as rig:
        split = rig.write(100)
        rig.wait_until(lambda: rig.call().version == "1", "the lease to run out")
        assert rig.seen()["models"]["tiny"]["has_lease"] is False
        pinned = rig.call(x_mansard_version="2")
        assert (pinned.status, "retry-after" in pinned.headers) == (503, True)

        def renew_and_ask() -> bool:
            nonlocal split
            split = renewed(split, "tiny")
            write_split(rig.home / "split.json", split)
            return str(rig.call().version) == "2"

        rig.wait_until(renew_and_ask, "the canary to be back")


def test_a_split_written_while_the_worker_has_no_descriptor_is_taken_when_it_has_one(make_rig: Any) -> None:
    with make_rig() as rig:
        site = load_site(rig.home.parent / "site.yaml")
        rig.write(None)
        assert lag_lines(site, 5.0)[1] == []
        soft, hard = resource.prlimit(rig.worker.pid, resource.RLIMIT_NOFILE)
        with contextlib.closing(UnixConnection(rig.home / "run/router-0.sock", DEADLINE_SECONDS)) as admin:

            def observed() -> dict[str, Any]:
                """Over a connection that the worker has already."""
                admin.request("GET", "/observations")
                return dict(json.loads(admin.getresponse().read()))

            assert observed()["split_problem"] is None
            resource.prlimit(rig.worker.pid, resource.RLIMIT_NOFILE, (0, hard))
            split = with_stable(Split(), "tiny", 1, rig.one.endpoint, "tiny", next(rig.terms))
            write_split(rig.home / "split.json", split)
            (lag,) = lagging_workers(site, split.term, 0.2)
            assert lag.startswith("router worker 0: does not tell which split it serves")
            rig.wait_until(lambda: observed()["split_problem"], "the worker to tell that it cannot read the split")
            seen = observed()
            assert ("Too many open files" in seen["split_problem"], seen["term"]) == (True, split.term - 1)
            resource.prlimit(rig.worker.pid, resource.RLIMIT_NOFILE, (soft, hard))
            rig.wait_until(lambda: observed()["term"] == split.term, "the split to be taken without another write")
            assert (observed()["split_problem"], observed()["split_problem_seconds"]) == (None, 0.0)
        assert lagging_workers(site, split.term) == []


def test_a_worker_that_serves_another_split_is_named_in_status_and_metrics(make_rig: Any) -> None:
    with make_rig() as rig:
        site = load_site(rig.home.parent / "site.yaml")
        split = rig.write(None)
        (rig.home / "split.json").write_bytes(b"{")
        rig.wait_until(lambda: rig.seen()["split_problem"], "the damage to be noticed")
        rig.wait_until(lambda: rig.seen()["split_problem_seconds"] > 0.1, "some time with it")
        text = metrics_of(rig)
        (line,) = [line for line in text.splitlines() if line.startswith("mansard_split_problem_seconds{")]
        assert float(line.split()[-1]) > 0.1
        assert "cannot be read" in lag_lines(site, 5.0)[1][0]
        os.kill(rig.worker.pid, signal.SIGSTOP)  # it does not see what is written now
        try:
            newer = with_stable(Split(), "tiny", 1, rig.one.endpoint, "tiny", split.term + 5)
            write_split(rig.home / "split.json", newer)
            assert "does not tell" in lagging_workers(site, newer.term, 0.2)[0]
        finally:
            os.kill(rig.worker.pid, signal.SIGCONT)
        assert lagging_workers(site, newer.term, DEADLINE_SECONDS) == []
        (worker,), lines = lag_lines(site, 5.0)
        assert (worker["term"], worker["serves_newest"], lines) == (newer.term, True, [])


def test_draining_finishes_streams_refuses_connections_and_exits_0(tmp_path: Path, make_rig: Any) -> None:
    with make_rig() as rig:
        rig.write(None)
        rig.one.behave(fail="hang-after-two")
        with rig.stream() as answer:
            answer.readline()
            rig.worker.send_signal(signal.SIGTERM)

            def is_closed() -> bool:
                with contextlib.closing(socket.socket()) as client:
                    return client.connect_ex(("127.0.0.1", rig.port)) != 0

            rig.wait_until(is_closed, "the listener to close")
            assert router_observations(load_site(tmp_path / "site.yaml"))[0]["in_flight"] == 1
            rig.one.behave(fail="none")
            assert answer.read().endswith(b"data: [DONE]\n\n")
        assert rig.worker.wait(DEADLINE_SECONDS) == 0
        assert router_observations(load_site(tmp_path / "site.yaml")) == []


def test_draining_gives_up_at_its_deadline(tmp_path: Path, make_rig: Any) -> None:
    with make_rig("--drain-seconds", "0.2") as rig:
        rig.write(None)
        rig.one.behave(fail="hang-after-two")
        with rig.stream() as answer:
            answer.readline()
            rig.worker.send_signal(signal.SIGTERM)
            assert rig.worker.wait(DEADLINE_SECONDS) == 0


def test_api_keys_are_asked_for_and_can_be_taken_back(tmp_path: Path, make_rig: Any) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(f'acme: "{hashlib.sha256(b"k1").hexdigest()}"\nbeta: ["{hashlib.sha256(b"k2").hexdigest()}"]\n')
    with make_rig(site_lines="api_keys: keys.yaml\n") as rig:
        rig.write(None)
        asked = [rig.call(authorization=a).status for a in ("Bearer k1", "bearer k2", "Bearer k3", "Basic k1", "")]
        assert asked == [200, 200, 401, 401, 401]
        assert rig.call().headers["www-authenticate"] == "Bearer"
        assert rig.call("/health", method="GET").status == 200
        keys.write_text("acme: not a digest\n")
        assert rig.call(authorization="Bearer k1").status == 200
        keys.write_text(f'acme: "{hashlib.sha256(b"k9").hexdigest()}"\n')
        rig.wait_until(lambda: rig.call(authorization="Bearer k1").status == 401, "the old key to be refused")
        assert rig.call(authorization="Bearer k9").status == 200
        assert rig.seen()["refused"]["401"] >= 5
        assert not any(key in (rig.home / "logs/router-0-access.jsonl").read_text() for key in ("k1", "k3", "k9"))
        assert rig.counts(1)["errors"] == 0


def test_too_much_at_once_and_too_large_are_refused_at_once(tmp_path: Path, make_rig: Any) -> None:
    with make_rig("--max-running", "1", "--max-waiting", "0", "--max-body-bytes", "100") as rig:
        rig.write(None)
        assert rig.call(body=b"x" * 101).status == 413
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", rig.port, timeout=DEADLINE_SECONDS)) as client:
            client.request("POST", "/v1/completions", iter([b"x" * 60, b"x" * 60]), encode_chunked=True)
            with contextlib.closing(client.getresponse()) as answer:
                assert answer.status == 413
        rig.one.behave(fail="hang-after-two")
        with rig.stream() as answer:
            answer.readline()
            busy = rig.call()
            assert (busy.status, busy.headers["retry-after"]) == (429, "2")
        rig.wait_until(lambda: rig.seen()["in_flight"] == 0, "the stream to end")
        rig.one.behave(fail="none")
        assert rig.call().status == 200


def test_a_taken_port_and_a_taken_index_end_with_one_line(tmp_path: Path, make_rig: Any) -> None:
    with make_rig() as rig:
        for port, code, words in ((rig.port, 2, "name a free port"), (0, 7, "choose another --index")):
            other = tmp_path / "other.yaml"
            other.write_text((tmp_path / "site.yaml").read_text().replace("router: 0", f"router: {port}"))
            command = [sys.executable, "-m", "mansard.serving.router.worker", "--site", str(other)]
            ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=DEADLINE_SECONDS)
            assert (ended.returncode, ended.stderr.count("\n")) == (code, 1)
            assert words in ended.stderr


def test_a_bounded_number_waits_in_order_and_nobody_waits_for_ever(make_rig: Any) -> None:
    limits = ("--max-running", "1", "--max-waiting", "1", "--wait-seconds", "1.5")
    with make_rig(*limits) as rig, ThreadPoolExecutor() as threads:
        rig.write(None)
        rig.one.behave(fail="hang-after-two")
        with rig.stream() as answer:
            answer.readline()
            waiting = threads.submit(rig.call)
            rig.wait_until(lambda: rig.seen()["in_flight"] == 2, "a second request")
            refused = rig.call()
            assert (refused.status, refused.headers["retry-after"]) == (429, "2")
            late = waiting.result()  # the stream goes on, so its turn does not come
            assert (late.status, b"no place became free" in late.body) == (429, True)
            waiting = threads.submit(rig.call)
            rig.wait_until(lambda: rig.seen()["in_flight"] == 2, "another that waits")
            rig.one.behave(fail="none")
            answer.read()
            assert waiting.result().status == 200


def test_a_client_that_waits_and_goes_away_leaves_its_place(make_rig: Any) -> None:
    with make_rig("--max-running", "1", "--max-waiting", "1") as rig:
        rig.write(None)
        rig.one.behave(fail="hang-after-two")
        with rig.stream() as answer:
            answer.readline()
            with rig.connect() as client:
                client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}")
                rig.wait_until(lambda: rig.seen()["in_flight"] == 2, "a second request")
            rig.wait_until(lambda: rig.seen()["in_flight"] == 1, "its end")
            rig.one.behave(fail="none")
            answer.read()
        assert rig.call().status == 200


def test_slow_clients_and_bodies_above_the_budget_are_sent_away(make_rig: Any) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n"
    with make_rig("--body-seconds", "0.3", "--idle-seconds", "0.3", "--max-held-bytes", "500") as rig:
        rig.write(None)
        with rig.connect() as client:
            client.sendall(head + b"x")
            assert received(client).startswith(b"HTTP/1.1 408")
        with rig.connect() as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost")
            assert received(client) == b""
        assert rig.call(body=b"x" * 400).status == 200
        assert rig.call(body=b"x" * 600).status == 429
        rig.wait_until(lambda: rig.seen()["in_flight"] == 0, "all to end")
        assert rig.call(body=b"x" * 400).status == 200
