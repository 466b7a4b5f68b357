"""`python -m mansard.fork_server SOCKET`: imports what stages compute with once, then forks a worker per request.

A worker that it forks is what `python -m mansard.worker` would be: its own session, standard streams, folder,
variables, command line and exit status; it has only imported already. Guarantees: no device is touched before a fork
(the GPUs are hidden while libraries are imported, what libraries remember of them is forgotten in the worker, and a
first forked process checks that it can use them); a server that cannot give this ends, and its caller executes workers.
It ends when its caller does; workers live by their own pipes.
"""

import array
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import select
import selectors
import socket
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mansard import worker
from mansard.stages import declaration
from mansard.worker_start import MAX_MESSAGE_BYTES, READY, STREAMS

IMPORTED = ("prove", "tokenize", "train", "fuse", "evaluate", "cost", "judge")
"""Stages whose modules it imports. Not quantize: llmcompressor asks for the device as it loads."""
STEPS = ("torch", "torch._dynamo", "transformers.modeling_utils")
"""What those import anyway and takes long: between two imports the server looks whether its caller is still there."""
LIBRARIES = ("torch", "torchao", "transformers", "accelerate")
"""They remember what they saw of the devices."""


def main(number: int) -> int:
    control = socket.socket(fileno=number)
    began_with = dict(os.environ)
    for module in (*STEPS, *(declaration(stage).module for stage in IMPORTED)):
        if _has_closed(control):
            return 0
        importlib.import_module(module)
    visible = json.loads(control.recv(MAX_MESSAGE_BYTES))["variables"]
    check = _fork()
    if check == 0:
        _check_devices(visible, began_with)
    if os.waitpid(check, 0)[1] != 0:
        print("a forked process does not see the device that this one was not to touch", file=sys.stderr)
        return 1
    control.send(READY)
    Workers(control, began_with).run()
    return 0


class Workers:
    """The workers that run: what is open for each, and how it ended."""

    def __init__(self, control: socket.socket, began_with: Mapping[str, str]) -> None:
        self._control = control
        self._began_with = began_with
        self._selector = selectors.DefaultSelector()
        self._running: dict[int, tuple[int, int]] = {}  # pid -> its pidfd, our end of its status pipe
        self._selector.register(control, selectors.EVENT_READ)

    def run(self) -> None:
        """Until the caller's end of the socket closes."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is not self._control:
                    self._reap(key.data)
                elif not self._start():
                    return

    def _start(self) -> bool:
        """Fork one worker; False when the caller has gone."""
        data, descriptors = _receive(self._control)
        if not data:
            return False
        request = json.loads(data)
        status = descriptors[STREAMS]
        pid = _fork()
        if pid == 0:
            for pidfd, pipe in self._running.values():
                os.close(pidfd)
                os.close(pipe)
            self._selector.close()
            self._control.close()
            _become_worker(request, descriptors, self._began_with)
        for descriptor in descriptors[:STREAMS]:
            os.close(descriptor)
        pidfd = os.pidfd_open(pid)
        self._running[pid] = (pidfd, status)
        self._selector.register(pidfd, selectors.EVENT_READ, pid)
        return True

    def _reap(self, pid: int) -> None:
        """Tell how it ended: whatever ended it, a signal or a library's own exit, it may not have said so itself."""
        pidfd, status = self._running.pop(pid)
        self._selector.unregister(pidfd)
        os.close(pidfd)
        _tell_end(status, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os.close(status)


def _has_closed(control: socket.socket) -> bool:
    poll = select.poll()
    poll.register(control, select.POLLHUP)
    return bool(poll.poll(0))


def _receive(control: socket.socket) -> tuple[bytes, list[int]]:
    """One message and its file descriptors; an empty one when the other end has closed."""
    numbers = array.array("i")
    room = socket.CMSG_SPACE((STREAMS + 1) * numbers.itemsize)
    data, extra, _, _ = control.recvmsg(MAX_MESSAGE_BYTES, room)
    for _, _, payload in extra:
        numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
    return data, list(numbers)


def _fork() -> int:
    """NumPy's, SciPy's and Arrow's pools have threads by now; they start them anew in the child."""
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 counts those threads
        return os.fork()


def _become_worker(request: Mapping[str, Any], descriptors: Sequence[int], began_with: Mapping[str, str]) -> NoReturn:
    """Nothing of the server is left in it but modules. Never returns."""
    *streams, status = descriptors
    code = 1
    try:
        os.setsid()
        for number, descriptor in enumerate(streams):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.chdir(request["folder"])
        _take_variables(request["variables"], began_with)
        _show_command([sys.executable, "-m", "mansard.worker", request["stage"], request["request_file"]])
        os.write(status, f"pid {os.getpid()}\n".encode())
        code = worker.main(request["stage"], request["request_file"])
    except BaseException:  # noqa: BLE001 - the last frame of a process: what Python would do
        traceback.print_exc()
    sys.stderr.flush()
    _tell_end(status, code)  # the server says it too, if it lives
    os._exit(code)


def _tell_end(status: int, code: int) -> None:
    """The first of these lines counts."""
    with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
        os.write(status, f"exit {code}\n".encode())


def _take_variables(variables: Mapping[str, str], began_with: Mapping[str, str]) -> None:
    """The variables of a worker, and those that libraries set while they were imported, as they do in any process."""
    for name in began_with.keys() - variables.keys():
        os.environ.pop(name, None)
    for name, value in variables.items():
        if began_with.get(name) != value:
            os.environ[name] = value
    for cached in gc.get_objects():
        if isinstance(cached, functools._lru_cache_wrapper) and _is_of_devices(cached):
            cached.cache_clear()


def _is_of_devices(cached: Any) -> bool:  # noqa: ANN401 - a function with a cache
    """Whether a function remembers a yes or no of a library that was imported without its GPUs."""
    module, name = str(cached.__module__), str(cached.__name__)
    return module.partition(".")[0] in LIBRARIES and name.lstrip("_").startswith(("is_", "has_", "check_"))


def _check_devices(visible: Mapping[str, str], began_with: Mapping[str, str]) -> NoReturn:
    """In a forked process: exit 0 if CUDA works in it wherever the machine has it, 1 if not."""
    code = 1
    try:
        _take_variables(visible, began_with)
        import torch

        if torch.cuda.device_count() > 0:  # as the driver's management library counts them
            torch.zeros(1, device="cuda")
        code = 0
    except BaseException:  # noqa: BLE001 - as above
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def _show_command(command: Sequence[str]) -> None:
    """Write the process's command line anew, so that people and tools see which stage it runs. As far as there is room:
    the server was started with a long argument."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begin, end = int(fields[45]), int(fields[46])  # arg_start and arg_end, 48 and 49 of proc(5)
    text = b"\0".join(word.encode() for word in command) + b"\0"
    if len(text) < end - begin:
        ctypes.memmove(begin, text.ljust(end - begin, b"\0"), end - begin)
    sys.argv = list(command[2:])


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
