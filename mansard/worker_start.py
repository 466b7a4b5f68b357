"""How a stage's worker process starts: forked by a server that has imported what stages compute with, or executed.

Both are the same to whoever waits: a process of its own session that reads a pipe from us (and dies when that closes),
writes messages to another, logs to a file, and ends with a status. `fork_servers` gives the block that it opens one
server an environment; without it, or where a server died or would run with other variables, the worker is executed.
Does not cover: what the messages say (launch.py) and the server's own side (fork_server.py).
"""

import array
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from mansard.errors import StageFailed
from mansard.site import Site
from mansard.site_sections import Environment

START_SECONDS = 300.0
"""How long a server may import, or take to fork: 12 s on an idle machine."""
MAX_MESSAGE_BYTES = 1 << 17
STREAMS = 3
READY = b"ready"
HIDING = {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
"""What a server has while it imports: no library gets at a GPU, and none asks the driver, which a fork would break."""
WITHOUT_TORCH = frozenset(
    ("corpus", "check", "expand", "remove-storey", "compose", *("contamination", "evaluate", "fingerprint", "judge"))
)
"""Stages that start in two seconds by themselves: they do not wait for a server that still imports."""
OF_SERVERS = ("MLFLOW_", "_MLFLOW_", "PREFECT_")
"""Variables of the command's own clients, set as these are imported; no stage reads them."""
ROOM = "-" * 1024
"""An argument that says nothing: a worker writes its own command line over the server's."""


class WorkerProcess(Protocol):
    """What launch.py needs of a process."""

    pid: int
    stdin: IO[bytes] | None
    stdout: IO[bytes] | None

    def wait(self) -> int: ...


@dataclass(frozen=True, slots=True)
class WorkerRequest:
    """One worker: `folder` is where it runs, `variables` all that it has."""

    stage: str
    request_file: Path
    folder: Path
    variables: Mapping[str, str]


class ForkedWorker:
    """A worker that a server forked. Like subprocess.Popen, as far as launch.py goes."""

    def __init__(self, stdin: int, stdout: int, status: int) -> None:
        self.pid = 0
        self.stdin: IO[bytes] | None = os.fdopen(stdin, "wb", buffering=0)
        self.stdout: IO[bytes] | None = os.fdopen(stdout, "rb", buffering=0)
        self._status = os.fdopen(status, "rb", buffering=0)
        self._code: int | None = None

    def began(self) -> bool:
        """Wait for its process id; False where no process came."""
        if select.select([self._status], [], [], START_SECONDS)[0]:
            kind, _, number = self._status.readline().partition(b" ")
            self.pid = int(number) if kind == b"pid" else 0
        return self.pid > 0

    def wait(self) -> int:
        """Its exit status; negative for a signal, as subprocess has it."""
        if self._code is None:
            kind, _, number = self._status.readline().partition(b" ")
            self._code = int(number) if kind == b"exit" else -signal.SIGKILL  # server dead too: nobody saw the signal
            self._status.close()
        return self._code

    def close(self) -> None:
        """Where it never began."""
        for stream in (self.stdin, self.stdout, self._status):
            if stream is not None:
                stream.close()


class ForkServer:
    """One server process of one interpreter; `variables` are those of its workers. It starts as it is made."""

    def __init__(self, environment: Environment, variables: Mapping[str, str], log: Path, folder: Path) -> None:
        self.variables = _deciding(variables)
        self._lock = threading.Lock()
        self._is_ready = False
        self._process: subprocess.Popen[bytes] | None = None
        our_end, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control = our_end
        log.parent.mkdir(parents=True, exist_ok=True)
        with server_end, log.open("ab") as log_file, contextlib.suppress(OSError):  # no interpreter: workers say so
            our_end.send(json.dumps({"variables": dict(variables)}).encode())
            self._process = subprocess.Popen(
                [str(environment.python), "-m", "mansard.fork_server", str(server_end.fileno()), ROOM],
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                env={**variables, **HIDING},
                cwd=str(folder),
                pass_fds=[server_end.fileno()],
                start_new_session=True,
            )

    def start(self, request: WorkerRequest, log_file: IO[bytes]) -> ForkedWorker | None:
        """The worker; None where this server cannot fork it (now): execute it."""
        is_patient = request.stage not in WITHOUT_TORCH
        if _deciding(request.variables) != self.variables or not self._lock.acquire(blocking=is_patient):
            return None
        try:
            return self._fork(request, log_file) if self._ready(START_SECONDS if is_patient else 0.0) else None
        finally:
            self._lock.release()

    def close(self) -> None:
        """End it. It holds nothing: workers live and die by their own pipes."""
        self._control.close()
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.5)  # it takes leave of the workers that just ended
            self._process.kill()
            self._process.wait()
            self._process = None

    def _ready(self, seconds: float) -> bool:
        """Whether it has imported everything, waited for so long. One that hangs is ended."""
        if self._process is None:
            return False
        if not self._is_ready:
            if select.select([self._control], [], [], seconds)[0]:
                with contextlib.suppress(ConnectionError):
                    self._is_ready = self._control.recv(len(READY)) == READY
                if not self._is_ready:
                    self.close()
            elif seconds:
                self.close()
        return self._is_ready

    def _fork(self, request: WorkerRequest, log_file: IO[bytes]) -> ForkedWorker | None:
        message = {
            "stage": request.stage,
            "request_file": str(request.request_file),
            "folder": str(request.folder),
            "variables": dict(request.variables),
        }
        (stdin, our_stdin), (our_stdout, stdout), (our_status, status) = os.pipe(), os.pipe(), os.pipe()
        worker = ForkedWorker(our_stdin, our_stdout, our_status)
        descriptors = array.array("i", [stdin, stdout, log_file.fileno(), status])
        try:
            data = json.dumps(message).encode()
            self._control.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
        except OSError:  # the server has ended, or the variables do not go into one message
            pass
        finally:
            for descriptor in (stdin, stdout, status):
                os.close(descriptor)
        if worker.began():
            return worker
        worker.close()
        self.close()
        return None


class ForkServers:
    """The servers of one command, by environment; each starts when it is first asked for."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._lock = threading.Lock()
        self._servers: dict[str, ForkServer] = {}

    def server(self, environment: Environment) -> ForkServer:
        """The environment's server, perhaps still importing."""
        key = repr((environment.python, sorted(environment.variables.items())))
        with self._lock:
            if key not in self._servers:
                stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
                log = self._site.logs / "stages" / f"{stamp}-fork-server-{os.getpid()}-{len(self._servers)}.out"
                variables = worker_variables(environment)
                self._servers[key] = ForkServer(environment, variables, log, self._site.home)
            return self._servers[key]

    def close(self) -> None:
        with self._lock:
            for server in self._servers.values():
                server.close()
            self._servers.clear()


_SERVERS: ContextVar[ForkServers | None] = ContextVar("fork_servers", default=None)


@contextlib.contextmanager
def fork_servers(site: Site, *stages: str) -> Iterator[None]:
    """Workers of the block's derivations are forked by servers that live as long as it does. Those of `stages` begin to
    import now, beside whatever the block does first."""
    servers = ForkServers(site)
    before = _SERVERS.set(servers)
    try:
        for stage in stages:
            servers.server(site.environment_of(stage))
        yield
    finally:
        _SERVERS.reset(before)
        servers.close()


def worker_variables(environment: Environment) -> dict[str, str]:
    """What a worker of this environment runs with."""
    return {
        **os.environ,
        **environment.variables,
        "PYTHONHASHSEED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def start_worker(environment: Environment, request: WorkerRequest, log_file: IO[bytes]) -> WorkerProcess:
    """The worker's process; StageFailed where its interpreter is not there."""
    servers = _SERVERS.get()
    forked = None if servers is None else servers.server(environment).start(request, log_file)
    if forked is not None:
        return forked
    try:
        return subprocess.Popen(
            [str(environment.python), "-m", "mansard.worker", request.stage, str(request.request_file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log_file,
            env=dict(request.variables),
            cwd=str(request.folder),
            start_new_session=True,
        )
    except OSError as error:
        raise StageFailed(f"{environment.python}: cannot start: {error.strerror}; run: make setup") from error


def _deciding(variables: Mapping[str, str]) -> dict[str, str]:
    """Without those that no stage reads."""
    return {name: value for name, value in variables.items() if not name.startswith(OF_SERVERS)}
