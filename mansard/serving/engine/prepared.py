"""A process that has imported vLLM and waits to become an engine (start/mansard_prepared.py is its side).

It has a session of its own, writes below logs/engines like an engine, and ends when its input closes: with this host at
the latest, or `end`. Once it became an engine it is that engine's process, and nothing of it is left here.
"""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mansard.errors import StageFailed
from mansard.serving.engine.command import spawn, variables
from mansard.serving.process import ProcessIdentity, identify, kill_group
from mansard.site import Site

MODULE = "mansard_prepared"


class PreparedEngine:
    """Started as it is made; StageFailed where the interpreter is not there."""

    def __init__(self, site: Site, architecture: str) -> None:
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        self.log = site.logs / "engines" / f"{stamp}-prepared-{os.urandom(4).hex()}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        folder = site.run / "engines"
        folder.mkdir(parents=True, exist_ok=True)
        python = str(site.environments[site.engine.environment].python)
        with self.log.open("ab") as log_file:
            environment = {**os.environ, **variables(site, "")}
            command = [python, "-m", MODULE, architecture]
            self._child = spawn(command, log_file, environment, folder, stdin=subprocess.PIPE)
        self._process: ProcessIdentity | None = identify(self._child.pid)

    @property
    def pid(self) -> int:
        return self._child.pid

    def is_waiting(self) -> bool:
        return self._child.poll() is None

    def become(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str]
    ) -> "subprocess.Popen[bytes] | None":
        """The process of the engine with this command; None where it had ended. It may still be importing."""
        assert self._child.stdin is not None
        message = {"command": list(command), "variables": dict(environment), "log": str(log)}
        try:
            with self._child.stdin as stdin:
                stdin.write(json.dumps(message).encode() + b"\n")
        except OSError:  # it has ended, or ends
            pass
        else:
            if self.is_waiting():
                return self._child
        self.end()
        return None

    def end(self) -> None:
        """It was not needed."""
        if self._child.stdin is not None:
            with contextlib.suppress(OSError):
                self._child.stdin.close()
        if self._process is not None:
            kill_group(self._process)
        self._child.wait()


def prepare(site: Site, architecture: str) -> PreparedEngine | None:
    """One more; None where it cannot start: the engine itself will say why."""
    try:
        return PreparedEngine(site, architecture)
    except StageFailed:
        return None
