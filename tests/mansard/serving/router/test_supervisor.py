"""Several workers on one socket: what a killed one costs, what they share, how they end."""

import contextlib
import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mansard.errors import MansardError
from mansard.serving.split import with_canary, write_split

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[4]
DEADLINE_SECONDS = 60.0
REQUEST = (
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 15\r\n\r\n" b'{"prompt": "x"}'
)
SUPERVISOR = "router.supervisor"


def received(client: socket.socket) -> bytes:
    """All until the other side closes."""
    return b"".join(iter(lambda: client.recv(65536), b""))


def pids_of(rig: Any, workers: int) -> list[int]:
    return [rig.seen(index)["pid"] for index in range(workers)]


@pytest.mark.parametrize("workers", [1, 2])
def test_connections_that_wait_survive_the_kill_of_a_worker(make_rig: Callable[..., Any], workers: int) -> None:
    with make_rig(site_lines=f"router: {{workers: {workers}, show_version: always}}\n", module=SUPERVISOR) as rig:
        rig.write(None)
        pids = pids_of(rig, workers)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        clients = [rig.connect() for _ in range(20)]
        for client in clients:
            client.sendall(REQUEST)
        os.kill(pids[0], signal.SIGKILL)
        for pid in pids[1:]:
            os.kill(pid, signal.SIGCONT)
        for client in clients:
            with client:
                assert received(client).startswith(b"HTTP/1.1 200")

        def is_back() -> bool:
            with contextlib.suppress(MansardError):
                return pids_of(rig, workers)[0] != pids[0]
            return False

        rig.wait_until(is_back, "the killed worker's successor")


def test_all_workers_take_a_split_and_none_takes_an_older_one(make_rig: Callable[..., Any]) -> None:
    with make_rig(module=SUPERVISOR) as rig:
        split = rig.write(None)
        write_split(rig.home / "split.json", with_canary(split, "tiny", 2, rig.two.endpoint, "tiny", 50, 9))
        for index in (0, 1):
            rig.wait_until(lambda index=index: rig.seen(index)["term"] == 9, f"worker {index} to take term 9")


def test_a_tenants_rate_holds_over_all_workers_and_operators_see_their_sum(
    tmp_path: Path, make_rig: Callable[..., Any]
) -> None:
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("k1", "k2", "op")}
    (tmp_path / "keys.yaml").write_text(
        f'acme: {{keys: "{digests["k1"]}", requests_per_minute: 10}}\nbeta: "{digests["k2"]}"\n'
    )
    (tmp_path / "tokens.yaml").write_text(f'ops: "{digests["op"]}"\n')
    lines = "api_keys: keys.yaml\noperator_tokens: tokens.yaml\n"
    with make_rig(site_lines=lines, module=SUPERVISOR) as rig:
        rig.write(None)
        replies = [rig.call(authorization="Bearer k1") for _ in range(12)]
        assert sorted(reply.status for reply in replies) == [200] + [429] * 11
        assert all(0 < int(reply.headers["retry-after"]) <= 6 for reply in replies if reply.status == 429)
        assert {rig.call(authorization="Bearer k2").status for _ in range(20)} == {200}
        scraped = {key: rig.call("/metrics", method="GET", authorization=f"Bearer {key}") for key in ("op", "k1")}
        assert (scraped["op"].status, scraped["k1"].status) == (200, 401)
        counts = re.findall(rb'mansard_requests_total\{model="tiny",outcome="ok",.*?\} (.*)', scraped["op"].body)
        assert sum(map(float, counts)) == 21


def test_without_operators_metrics_are_no_path(make_rig: Callable[..., Any]) -> None:
    with make_rig() as rig:
        rig.write(None)
        assert rig.call("/metrics", method="GET").status == 404


def test_a_supervisor_that_is_ended_drains_its_workers(make_rig: Callable[..., Any]) -> None:
    with make_rig(module=SUPERVISOR) as rig:
        rig.write(None)
        rig.worker.terminate()
        assert rig.worker.wait(DEADLINE_SECONDS) == 0
        with pytest.raises(ConnectionRefusedError):
            rig.connect()


def test_workers_serve_on_when_their_supervisor_is_killed(make_rig: Callable[..., Any]) -> None:
    with make_rig(module=SUPERVISOR) as rig:
        rig.write(None)
        rig.worker.kill()
        rig.worker.wait(DEADLINE_SECONDS)
        assert {rig.call().status for _ in range(8)} == {200}


def test_a_supervisor_whose_workers_cannot_start_ends_with_their_exit_code(
    tmp_path: Path, make_rig: Callable[..., Any]
) -> None:
    with make_rig():
        site = tmp_path / "other.yaml"
        site.write_text((tmp_path / "site.yaml").read_text() + "api_keys: missing.yaml\n")
    command = [sys.executable, "-m", f"mansard.serving.{SUPERVISOR}", "--site", str(site)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=DEADLINE_SECONDS)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "cannot read the keys" in ended.stderr
