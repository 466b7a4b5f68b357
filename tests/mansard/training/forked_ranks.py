"""A launcher of ranks in torchrun's place: a server that has imported once what a rank imports forks each of them.

`forked_ranks.py SOCKET` serves. `forked_ranks.py SOCKET -m mansard.rank REQUEST` is what a site names as its
`training.launcher`: it ends when the ranks have, with 0 if all did well. As under torchrun a rank that fails ends the
others. A launch by torchrun spends some 25 s of CPU on importing torch, DeepSpeed and transformers in three processes.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

END_SECONDS = 5.0


def serve(path: str) -> None:
    """Until it is ended; callers wait while it imports."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        os.environ["OMP_NUM_THREADS"] = "1"  # as torchrun has it
        from mansard import rank

        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # launches are nobody's zombies
        while True:
            caller, _ = server.accept()
            with caller:
                if os.fork() == 0:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    server.close()
                    caller.sendall(os.getpid().to_bytes(4, "big"))
                    caller.sendall(bytes([launch(caller.recv(1 << 16).decode(), rank.main)]))
                    os._exit(0)


def launch(request: str, main: Callable[[str], int]) -> int:
    """Fork the request's ranks and wait for all; the first bad exit code, or 0."""
    count = int(json.loads(Path(request).read_text())["processes"])
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    running, code = set[int](), 0
    signal.signal(signal.SIGTERM, lambda *_: end(running, signal.SIGKILL))
    for number in range(count):
        if (pid := os.fork()) == 0:
            os.environ.update(common, RANK=str(number), LOCAL_RANK=str(number))
            run(request, main)
        running.add(pid)
    while running:
        pid, status = os.wait()
        running.discard(pid)
        if status and code == 0:
            code = 1
            end(running, signal.SIGTERM)
            threading.Timer(END_SECONDS, end, (running, signal.SIGKILL)).start()
    return code


def run(request: str, main: Callable[[str], int]) -> None:
    """The rank itself; never returns."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        code = main(request)
    except BaseException:  # noqa: BLE001 - nothing runs above it in a forked process
        sys.excepthook(*sys.exc_info())  # the rank's own: it says why and exits
        code = 1
    sys.stderr.flush()
    os._exit(code)


def end(pids: set[int], number: signal.Signals) -> None:
    for pid in tuple(pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def ask(path: str, request: str) -> int:
    """The launcher that the stage sees; 1 where the server is gone. Ended by SIGTERM it leaves no rank."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        forked = int.from_bytes(server.recv(4), "big")
        signal.signal(signal.SIGTERM, lambda *_: end({forked}, signal.SIGTERM))
        server.sendall(request.encode())
        return (server.recv(1) or b"\1")[0]


if __name__ == "__main__":
    _, where, *words = sys.argv
    sys.exit(ask(where, words[-1]) if words else serve(where))
