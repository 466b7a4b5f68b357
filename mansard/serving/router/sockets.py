"""The sockets of router workers: the public one, which all workers of a site inherit, and an admin socket for each.

Guarantees: connections that wait in the public socket's queue outlive any one worker, because the socket is one; one
worker per index (a lock file); the stale admin socket of a killed worker is replaced.
"""

import fcntl
import os
import socket
from pathlib import Path

from mansard.errors import BadInput, Conflict

BACKLOG = 4096
"""The kernel cuts it at net.core.somaxconn (4,096 by default)."""
SEND_BYTES = 256 * 1024
"""What the kernel takes of an answer that its client does not read (twice that, with its own accounts)."""


def listen(port: int) -> socket.socket:
    """The public socket on 127.0.0.1; connections queue from now on. BadInput for a taken port."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)  # accepted ones inherit it
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise BadInput(f"ports.router {port}: {error.strerror}; name a free port in the site file") from error
    return listener


class AdminSocket:
    """The bound Unix socket of one worker, mode 600, held under a lock so that two workers never share an index."""

    def __init__(self, run: Path, index: int) -> None:
        self._path = run / f"router-{index}.sock"
        self._lock = -1
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def __enter__(self) -> socket.socket:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(f"{self._path}: another router worker has this index; choose another --index") from error
        beside = self._path.with_suffix(".new")
        beside.unlink(missing_ok=True)
        try:
            self._socket.bind(str(beside))
        except OSError as error:
            raise BadInput(f"{self._path}: {error.strerror or error}; give the site a shorter home") from error
        beside.chmod(0o600)
        beside.replace(self._path)
        return self._socket

    def __exit__(self, *raised: object) -> None:
        self._path.unlink(missing_ok=True)
        self._socket.close()
        os.close(self._lock)
