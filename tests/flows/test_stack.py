import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flows import stack, stack_process
from flows.stack_process import Program
from mansard.errors import BadInput, MansardError
from mansard.site import Site, load_site
from tests.free_ports import free_port

SERVER = (
    "import http.server, signal, sys\n"
    "if sys.argv[2] == 'stubborn': signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "class Health(http.server.BaseHTTPRequestHandler):\n"
    "    def do_GET(self):\n"
    "        self.send_response(200); self.end_headers()\n"
    "    def log_message(self, *words): pass\n"
    "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Health).serve_forever()\n"
)


def program(folder: Path, code: str = SERVER, kind: str = "kind", **fields: float) -> Program:
    port = free_port()
    return Program(
        name="server",
        command=(sys.executable, "-c", code, str(port), kind),
        variables={},
        pid_file=folder / "server.pid",
        log=folder / "logs/server.log",
        answers=lambda: stack_process.http_answers(port, "/health"),
        port=port,
        **fields,  # type: ignore[arg-type]
    )


@pytest.fixture
def site(tmp_path: Path) -> Site:
    ports = [free_port() for _ in range(3)]
    (tmp_path / "site.yaml").write_text(
        f"""
format: 1
home: home
data: data
models: [demo]
environments:
  main: {{python: python, lock: lock.txt}}
  serve: {{python: python, lock: lock.txt}}
stages: {{default: main}}
ports: {{prefect: {ports[0]}, mlflow: {ports[1]}, router: {ports[2]}}}
"""
    )
    return load_site(tmp_path / "site.yaml")


@pytest.mark.parametrize("kind", ["kind", "stubborn"])
def test_program_is_started_found_again_and_ended(tmp_path: Path, kind: str) -> None:
    server = program(tmp_path, kind=kind, stop_seconds=5.0 if kind == "kind" else 0.5)
    assert stack_process.running_pid(server) is None
    stack_process.start(server, tmp_path)
    try:
        stack_process.wait_until_ready(server, lambda line: None)
        pid = stack_process.running_pid(server)
        assert pid is not None and os.getsid(pid) == pid
        assert not stack_process.port_is_free(server.port or 0)
    finally:
        assert stack_process.stop(server)
    assert stack_process.running_pid(server) is None
    assert not stack_process.stop(server)
    assert stack_process.port_is_free(server.port or 0)


def test_program_that_was_killed_is_no_longer_running(tmp_path: Path) -> None:
    server = program(tmp_path)
    stack_process.start(server, tmp_path)
    stack_process.wait_until_ready(server, lambda line: None)
    pid = stack_process.running_pid(server)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert stack_process.running_pid(server) is None


def test_pid_that_belongs_to_somebody_else_now_is_not_ours(tmp_path: Path) -> None:
    server = program(tmp_path)
    server.pid_file.write_text(json.dumps({"format": 1, "pid": os.getpid(), "start_ticks": 1}))
    assert stack_process.running_pid(server) is None
    assert not stack_process.stop(server)


def test_program_that_ends_while_it_starts_says_its_last_line(tmp_path: Path) -> None:
    server = program(tmp_path, code="raise SystemExit('no such database')")
    stack_process.start(server, tmp_path)
    with pytest.raises(MansardError, match=r"server ended while it started: no such database; log: .*server.log"):
        stack_process.wait_until_ready(server, lambda line: None)


def test_program_that_never_answers_is_told_after_its_deadline(tmp_path: Path) -> None:
    server = program(tmp_path, code="import signal; signal.pause()", start_seconds=0.2)
    stack_process.start(server, tmp_path)
    try:
        with pytest.raises(MansardError, match=r"did not answer within 0 s"):
            stack_process.wait_until_ready(server, lambda line: None)
    finally:
        stack_process.stop(server)


def test_taken_port_is_refused_before_anything_starts(site: Site) -> None:
    with socket.create_server(("127.0.0.1", site.ports.mlflow)):
        with pytest.raises(BadInput, match=rf"ports.mlflow: port {site.ports.mlflow} is taken") as raised:
            stack.up(site, lambda line: None)
        assert str(site.path) in str(raised.value)
    assert {r["state"] for r in stack.status_of_processes(site)} == {"stopped"}
    assert not list(site.logs.glob("*.log"))


def test_second_command_waits_for_the_first(site: Site) -> None:
    told: list[str] = []
    done = threading.Event()

    def end() -> None:
        stack.down(site, told.append)
        done.set()

    with stack._stack_lock(site, told.append):
        thread = threading.Thread(target=end)
        thread.start()
        waiting = threading.Event()
        while not told:
            waiting.wait(0.01)
        assert not done.is_set()
    thread.join(timeout=60)
    assert done.is_set()
    assert told == ["another command is starting or stopping the stack: waiting for it"]


def test_requests_to_this_machine_use_no_proxy(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "example.org")
    assert stack.client_variables(site)["NO_PROXY"] == "example.org,127.0.0.1,localhost"


def test_status_of_a_stopped_stack_starts_nothing(site: Site) -> None:
    names = [record["name"] for record in stack.status_of_processes(site)]
    assert names == ["prefect", "mlflow", "host", "router", "mirror", "deployments"]
    assert not site.home.exists()
    assert not stack.is_up(site)


def test_stack_is_known_without_prefect_and_mlflow() -> None:
    code = "import sys, flows.stack; assert not {'prefect', 'mlflow', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_a_killed_leader_left_is_asked_to_end_before_it_is_killed(tmp_path: Path) -> None:
    mark, ready = tmp_path / "drained", tmp_path / "ready"
    child = (
        "import pathlib, signal, sys\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(mark)!r}).touch(), sys.exit()))\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "signal.pause()"
    )
    leader = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    server = stack_process.Program(
        name="router",
        command=(sys.executable, "-c", leader),
        variables={},
        pid_file=tmp_path / "router.pid",
        log=tmp_path / "router.log",
        answers=ready.exists,
    )
    stack_process.start(server, tmp_path)
    stack_process.wait_until_ready(server, lambda line: None)
    pid = stack_process.running_pid(server)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    stack_process.end_leftovers(server)
    assert mark.exists()
