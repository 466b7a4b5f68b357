"""The thin client of the engine host and of the router workers: HTTP/JSON over a Unix socket.

Standard library only: the on-call commands import it. An answer {"error": {"kind", "message"}} is raised as the class
of mansard.errors that it names; nobody listening is HostDown. Not covered: starting what is down.
"""

import http.client
import json
import socket
from pathlib import Path
from typing import Any

from mansard.errors import BadInput, Conflict, MansardError, NotAllowed, error_named
from mansard.site import Site

FORMAT = 1
_KIND_OF_STATUS = {400: BadInput, 403: NotAllowed, 404: BadInput, 409: Conflict}


class HostDown(MansardError):
    """Nobody listens on the socket, or the process died before it answered."""


def is_nobody_there(error: HostDown) -> bool:
    """Whether nobody listens; otherwise somebody does and broke the connection off (it has no descriptor free, say)."""
    return isinstance(error.__cause__, (FileNotFoundError, ConnectionRefusedError))


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, socket_path: Path, timeout_seconds: float) -> None:
        super().__init__("localhost", timeout=timeout_seconds)
        self._socket_path = socket_path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._socket_path))


class HostClient:
    """Calls one process behind one socket; a connection per call, so it may be shared and outlives restarts."""

    def __init__(self, socket_path: Path) -> None:
        self.socket_path = socket_path

    def call(
        self, method: str, path: str, body: dict[str, Any] | None = None, timeout_seconds: float = 30.0
    ) -> dict[str, Any]:
        """The answer's JSON. "format": 1 is added to `body`.

        Raises HostDown when nobody listens, MansardError when no answer came in `timeout_seconds`, and what the
        other side's error names.
        """
        connection = UnixConnection(self.socket_path, timeout_seconds)
        data = None if body is None else json.dumps({"format": FORMAT, **body}).encode()
        headers = {} if data is None else {"content-type": "application/json"}
        try:
            connection.request(method, path, data, headers)
            answer = connection.getresponse()
            status, text = answer.status, answer.read()
        except TimeoutError as error:
            raise MansardError(
                f"{self.socket_path}: no answer to {method} {path} in {timeout_seconds:g} s; it may still be at work"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise HostDown(f"{self.socket_path}: nobody answers ({reason}); start it with: mansard up") from error
        finally:
            connection.close()
        return self._read(method, path, status, text)

    def _read(self, method: str, path: str, status: int, text: bytes) -> dict[str, Any]:
        try:
            tree = json.loads(text)
        except ValueError as error:
            raise MansardError(f"{self.socket_path}: {method} {path} answered {status} without JSON") from error
        if not isinstance(tree, dict):
            raise MansardError(f"{self.socket_path}: {method} {path} answered {status} with {type(tree).__name__}")
        kind, message = (
            _KIND_OF_STATUS.get(status, MansardError),
            f"{self.socket_path}: {method} {path} answered {status}",
        )
        named = tree.get("error")
        if isinstance(named, dict):
            raise error_named(str(named.get("kind")), str(named.get("message", message)), kind)
        if status >= 400:
            raise kind(message)
        return tree


def router_sockets(site: Site) -> list[Path]:
    """The admin sockets of the router workers that run or ran here, by index."""
    return sorted(site.run.glob("router-*.sock"), key=lambda path: (len(path.name), path.name))


def router_observations(site: Site, timeout_seconds: float = 5.0) -> list[dict[str, Any]]:
    """GET /observations of each router worker that answers; one that is dead or hangs is left out."""
    return list(router_observations_by_worker(site, timeout_seconds).values())


def router_observations_by_worker(
    site: Site, timeout_seconds: float, without: int | None = None
) -> dict[str, dict[str, Any]]:
    """The same by the worker's index, perhaps `without` one. One that is there and does not answer is left out too."""
    observations = {}
    for path in router_sockets(site):
        index = path.stem.removeprefix("router-")
        if index != str(without):
            try:
                observations[index] = HostClient(path).call("GET", "/observations", timeout_seconds=timeout_seconds)
            except MansardError:
                continue
    return observations
