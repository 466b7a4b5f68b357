"""One long-running program of the local stack: started in a session of its own, found again, ended.

A pid file holds the process id together with its start time, so that a number the system gave to somebody else is
never taken for ours. Starting waits for nothing; `answers` says whether the program is ready. Linux only (/proc).
"""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mansard.canonical import write_atomically
from mansard.errors import MansardError
from mansard.private_files import UMASK

POLL_SECONDS = 0.1
PORT_SECONDS = 10.0
"""A server that was ended gives its port back at once, as a rule."""


class EndedEarly(MansardError):
    """A program ended before it answered."""


@dataclass(frozen=True, slots=True)
class Program:
    """`port` is None for a program without one; `port_key` is where the site names it. `stop_seconds`: TERM to KILL.

    `start_seconds` is generous: a shared machine needed 96 s for what an idle one does in 35 (2026-11-22).
    """

    name: str
    command: tuple[str, ...]
    variables: Mapping[str, str]
    pid_file: Path
    log: Path
    answers: Callable[[], bool]
    port: int | None = None
    port_key: str = ""
    url: str = ""
    login_fingerprint: str = ""
    start_seconds: float = 900.0
    stop_seconds: float = 20.0


def running_pid(program: Program) -> int | None:
    """The process id of the running program, or None."""
    try:
        record = json.loads(program.pid_file.read_text())
    except FileNotFoundError:
        return None
    pid = int(record["pid"])
    return pid if _start_ticks(pid) == record["start_ticks"] else None


def is_outdated(program: Program) -> bool:
    """Whether it runs, but was started with another command than it would be now."""
    if running_pid(program) is None:
        return False
    return bool(json.loads(program.pid_file.read_text())["command"] != list(program.command))


def has_other_login(program: Program) -> bool:
    """Whether it runs, but was started with another password of the pages than it would be now."""
    if running_pid(program) is None:
        return False
    record = json.loads(program.pid_file.read_text())
    return bool(record.get("login_fingerprint", "") != program.login_fingerprint)


def start(program: Program, folder: Path) -> None:
    """Start it in `folder`, detached from this terminal; its output goes to its log."""
    program.log.parent.mkdir(parents=True, exist_ok=True)
    with program.log.open("ab") as log:
        process = subprocess.Popen(
            program.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **program.variables},
            cwd=folder,
            start_new_session=True,
            umask=UMASK,
        )
    record = {
        "format": 1,
        "pid": process.pid,
        "start_ticks": _start_ticks(process.pid),
        "command": program.command,
        "login_fingerprint": program.login_fingerprint,
    }
    write_atomically(program.pid_file, json.dumps(record).encode())
    process.returncode = 0  # detached on purpose: `stop` waits for it, perhaps from another process


def wait_until_ready(program: Program, say: Callable[[str], None]) -> None:
    """Wait for its first answer; raises with the log's last line: EndedEarly, or MansardError when it stays silent."""
    begun = time.monotonic()
    told = begun
    while not (running_pid(program) and program.answers()):
        now = time.monotonic()
        if running_pid(program) is None:
            raise EndedEarly(f"{program.name} ended while it started: {last_line(program.log)}; log: {program.log}")
        if now - begun > program.start_seconds:
            raise MansardError(
                f"{program.name} did not answer within {program.start_seconds:.0f} s: {last_line(program.log)}; "
                f"log: {program.log}"
            )
        if now - told > 10:
            told = now
            say(f"{program.name}: still starting, {now - begun:.0f} s")
        time.sleep(POLL_SECONDS)


def stop(program: Program) -> bool:
    """End the program and its process group and wait until it is gone. False when it did not run."""
    pid = running_pid(program)
    if pid is None:
        end_leftovers(program)
    else:
        _signal_group(pid, signal.SIGTERM)
        if not _gone_within(program, program.stop_seconds):
            _signal_group(pid, signal.SIGKILL)
            _gone_within(program, program.stop_seconds)
        _signal_group(pid, signal.SIGKILL)  # what the leader left behind in its group
    program.pid_file.unlink(missing_ok=True)
    return pid is not None


def end_leftovers(program: Program) -> None:
    """End the children of a leader that was killed: its pid stays reserved while its group has members.

    They are asked first: a router's workers still answer users, and finish what they have.
    """
    with contextlib.suppress(FileNotFoundError):
        pid = int(json.loads(program.pid_file.read_text())["pid"])
        if _start_ticks(pid) is not None:
            return
        deadline = time.monotonic() + program.stop_seconds
        _signal_group(pid, signal.SIGTERM)
        while _has_members(pid) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        _signal_group(pid, signal.SIGKILL)


def port_is_free(port: int) -> bool:
    """Whether a server could listen on 127.0.0.1:port now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def wait_for_port(port: int) -> bool:
    """Whether the port is free, or becomes free soon."""
    deadline = time.monotonic() + PORT_SECONDS
    while not port_is_free(port):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def http_answers(port: int, path: str, timeout_seconds: float = 2.0) -> bool:
    """Whether 127.0.0.1:port answers GET `path` with 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_seconds)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def last_line(log: Path) -> str:
    """The last line that says something, at most 300 characters."""
    if not log.exists():
        return "it wrote no log"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


def _gone_within(program: Program, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while running_pid(program) is not None:
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _has_members(group: int) -> bool:
    """Whether a process of the group lives; zombies that nobody has waited for do not."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, of_group, *_ = stat.read_text(errors="replace").rpartition(")")[2].split()
            if int(of_group) == group and state not in ("Z", "X"):
                return True
    return False


def _start_ticks(pid: int) -> int | None:
    """When the process started (clock ticks since boot); None when it is gone or a zombie. Reaps our own children."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    after_name = stat.rpartition(")")[2].split()
    return None if after_name[0] in ("Z", "X") else int(after_name[19])
