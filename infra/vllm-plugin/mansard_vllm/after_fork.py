"""What an EngineCore that was forked from the API server must not share with it. Standard library only."""

import os
import signal
import socket
import stat
from pathlib import Path


def let_go() -> None:
    """What the EngineCore must not share with the API server that it was forked from: the event loop's signals, and the
    port, which would otherwise take connections after the API server has died, and never answer."""
    signal.set_wakeup_fd(-1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        if _is_port(number):
            os.dup2(nothing, number)  # not closed: its owner's object would close whatever has the number by then
    os.close(nothing)


def _is_port(number: int) -> bool:
    """Whether a file descriptor is a TCP socket that is bound and has no peer."""
    try:
        if not stat.S_ISSOCK(os.fstat(number).st_mode):
            return False
    except OSError:
        return False  # the one that read the folder
    with socket.socket(fileno=os.dup(number)) as found:
        if found.family not in (socket.AF_INET, socket.AF_INET6) or found.type != socket.SOCK_STREAM:
            return False
        try:
            found.getpeername()
        except OSError:
            return bool(found.getsockname()[1])
        return False
