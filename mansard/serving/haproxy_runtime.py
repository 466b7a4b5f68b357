"""HAProxy over its runtime socket: servers that match a model's split, one a version, named v7.

Guarantees: `plan` is pure and ends with exactly the split's weights; a version gains weight before another loses its
own, so that somebody always serves; what was set is read back. A version without an engine is in maintenance; one that
left the split is deleted once nothing runs on it. The server's id is its version, which fixes its points on the ring of
consistent hashing whatever the order in which servers came. Standard library only. HAProxy 2.6 or newer.
"""

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from mansard.errors import MansardError
from mansard.serving.split import ModelSplit

BACKEND = "engines"
WEIGHT_PER_PERCENT = 2
"""HAProxy's weights go to 256; more points on the ring make shares more exact."""
TIMEOUT_SECONDS = 5.0
_MAINTENANCE = 0x01


class HaproxyFailed(MansardError):
    """Nobody answers on the runtime socket, or HAProxy refused a command."""


@dataclass(frozen=True, slots=True)
class Server:
    """One version's server as HAProxy has it, or should have it. `port` is on loopback; None: in maintenance."""

    port: int | None
    weight: int


def wanted_servers(model: ModelSplit) -> dict[int, Server]:
    """By version. The weights are the split's, times WEIGHT_PER_PERCENT."""
    weights = {model.stable: 100 - model.canary_percent}
    if model.canary is not None:
        weights[model.canary] = model.canary_percent
    return {
        number: Server(
            None if version.endpoint is None else urlsplit(version.endpoint).port,
            weights.get(number, 0) * WEIGHT_PER_PERCENT,
        )
        for number, version in model.versions.items()
    }


def plan(present: Mapping[int, tuple[Server, int]], wanted: Mapping[int, Server]) -> list[str]:
    """Commands that turn `present` (server and the port it is registered with) into `wanted`; none when it is so."""
    changed = [n for n in wanted if n not in present or present[n][0] != wanted[n]]
    added: list[str] = []
    moved: list[str] = []
    gaining: list[str] = []
    losing: list[str] = []
    for number in sorted(changed):
        server, name = wanted[number], f"{BACKEND}/v{number}"
        before = present[number][0] if number in present else None
        if server.port is None:
            if before is not None and before.port is not None:
                losing.append(f"set server {name} state maint")
            continue
        if before is None:
            added.append(f"add server {name} 127.0.0.1:{server.port} id {number} weight 0")
        elif present[number][1] != server.port:
            moved.append(f"set server {name} addr 127.0.0.1 port {server.port}")
        rises = before is None or server.weight >= before.weight
        (gaining if rises else losing).append(f"set server {name} weight {server.weight}")
        if before is None or before.port is None:
            gaining.append(f"set server {name} state ready")
    leaving = [f"set server {BACKEND}/v{n} state maint" for n in sorted(present) if n not in wanted]
    deleted = [f"del server {BACKEND}/v{n}" for n in sorted(present) if n not in wanted]
    return [*added, *moved, *gaining, *losing, *leaving, *deleted]


class Runtime:
    """One HAProxy's runtime socket; a connection per command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def ask(self, command: str) -> str:
        """HAProxy's answer. Raises HaproxyFailed when nobody listens."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
                client.settimeout(TIMEOUT_SECONDS)
                client.connect(str(self.path))
                client.sendall(command.encode() + b"\n")
                return b"".join(iter(lambda: client.recv(65536), b"")).decode("utf-8", "replace").strip()
        except OSError as error:
            raise HaproxyFailed(f"{self.path}: HAProxy does not answer: {error}") from error

    def pid(self) -> int:
        """Of the process that answers."""
        for line in self.ask("show info").splitlines():
            name, _, value = line.partition(": ")
            if name == "Pid":
                return int(value)
        raise HaproxyFailed(f"{self.path}: `show info` names no process")

    def servers(self) -> dict[int, tuple[Server, int]]:
        """By version, with the port that each is registered with."""
        _, header, *rows = self.ask(f"show servers state {BACKEND}").splitlines() or ["", ""]
        names = header.removeprefix("# ").split()
        found = {}
        for row in rows:
            values = dict(zip(names, row.split(), strict=False))
            if not values.get("srv_name", "").startswith("v"):
                continue
            port = int(values["srv_port"])
            is_away = int(values["srv_admin_state"]) & _MAINTENANCE
            server = Server(None if is_away else port, int(values["srv_uweight"]))
            found[int(values["srv_name"][1:])] = (server, port)
        return found

    def carry(self, model: ModelSplit) -> None:
        """Make HAProxy carry the split and read it back. Raises HaproxyFailed when it does not."""
        wanted = wanted_servers(model)
        commands = plan(self.servers(), wanted)
        answers = {command: self.ask(command) for command in commands}
        found = self.servers()
        wrong = {n: found.get(n) for n, server in wanted.items() if not _carries(found.get(n), server)}
        stray = [n for n, (server, _) in found.items() if n not in wanted and server.port is not None]
        if wrong or stray:
            said = "; ".join(f"{c}: {a}" for c, a in answers.items() if a)
            raise HaproxyFailed(f"{self.path}: HAProxy does not carry {model.name} as told: {wrong or stray}: {said}")


def _carries(found: tuple[Server, int] | None, wanted: Server) -> bool:
    if wanted.port is None:
        return found is None or found[0].port is None
    return found is not None and found[0] == wanted
