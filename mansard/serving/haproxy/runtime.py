"""HAProxy over its runtime socket: one server a version, named v7, and a map that says who goes to the canary.

Guarantees: `plan` is pure; users go to the canary by the rule of split.py's `choose`, so a raised weight only adds some
and the analysis knows each one's side; stable alone has weight in the balancing, so what is not sent by name, and every
second try, goes there; a canary gets users after its server is ready and loses them before it leaves; what was set is
read back. A version without an engine is in maintenance; one that left the split is deleted once nothing runs on it.
Standard library only. HAProxy 2.6 or newer.
"""

import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from mansard.errors import MansardError
from mansard.serving.split import BUCKETS_PER_PERCENT, ModelSplit

BACKEND = "engines"
FULL_WEIGHT = 256
IN_FLIGHT = "in_flight"
CLOCK_MILLISECONDS = 2**31
"""HAProxy's table keeps 32 bits: times are told modulo 25 days."""
TIMEOUT_SECONDS = 5.0
MAX_AGE_SECONDS = 86_400.0
"""Above it the clock was set, or HAProxy's is a little ahead of ours."""
_MAINTENANCE = 0x01


class HaproxyFailed(MansardError):
    """Nobody answers on the runtime socket, or HAProxy refused a command."""


@dataclass(frozen=True, slots=True)
class Server:
    """One version's server as HAProxy has it, or should have it. `port` is on loopback; None: in maintenance."""

    port: int | None
    weight: int


@dataclass(frozen=True, slots=True)
class Carried:
    """All of it: servers by version, and the map: places below `limit` (of NUM_BUCKETS) go to `canary` (0: nobody), and
    follow from `salt`."""

    servers: Mapping[int, Server]
    canary: int = 0
    limit: int = 0
    salt: str = ""


@dataclass(frozen=True, slots=True)
class InFlight:
    """`number` requests of one sticky key, the newest `age_seconds` old: none of them is younger. `canary` is 0 for
    those that went to stable; `has_begun`: the newest one's answer. `tenant` is the newest one's, too."""

    key: int
    number: int
    age_seconds: float
    canary: int
    has_begun: bool
    tenant: int


def wanted(model: ModelSplit) -> Carried:
    """What HAProxy should have for a model's split."""
    servers = {
        number: Server(
            None if version.endpoint is None else urlsplit(version.endpoint).port,
            FULL_WEIGHT if number == model.stable else 0,
        )
        for number, version in model.versions.items()
    }
    is_there = model.canary is not None and servers[model.canary].port is not None
    limit = model.canary_percent * BUCKETS_PER_PERCENT if is_there else 0
    return Carried(servers, model.canary or 0, limit, model.salt)


def plan(present: Carried, ports: Mapping[int, int], new: Carried) -> list[str]:
    """Commands (the map's as `set map limit N`, without its file) that turn `present` into `new`; none when it is so.

    `ports` are those that the present servers are registered with, in maintenance too.
    """
    coming: list[str] = []
    going: list[str] = []
    for number, server in sorted(new.servers.items()):
        name, before = f"{BACKEND}/v{number}", present.servers.get(number)
        if server.port is None:
            if before is not None and before.port is not None:
                going.append(f"set server {name} state maint")
            continue
        if before is None:
            coming.append(f"add server {name} 127.0.0.1:{server.port} weight 0")
        elif ports[number] != server.port:
            coming.append(f"set server {name} addr 127.0.0.1 port {server.port}")
        if before is None or before.weight != server.weight:
            (coming if server.weight else going).append(f"set server {name} weight {server.weight}")
        if before is None or before.port is None:
            coming.append(f"set server {name} state ready")
    gone = [f"{BACKEND}/v{number}" for number in sorted(present.servers) if number not in new.servers]
    going += [f"set server {name} state maint" for name in gone] + [f"del server {name}" for name in gone]
    is_other = (present.canary, present.salt) != (new.canary, new.salt)
    nobody = ["set map limit 0"] if present.limit and is_other else []
    routes = [f"set map canary {new.canary}"] if present.canary != new.canary else []
    routes += [f"set map salt {new.salt}/"] if present.salt != new.salt else []
    routes += [f"set map limit {new.limit}"] if new.limit != (0 if nobody else present.limit) else []
    return [*nobody, *coming, *routes, *going]


class Runtime:
    """One HAProxy's runtime socket; a connection per command."""

    def __init__(self, path: Path, routes: Path, salts: Path) -> None:
        self.path = path
        self.routes = routes
        self.salts = salts

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

    def carried(self) -> tuple[Carried, dict[int, int]]:
        """What HAProxy has, and the ports its servers are registered with."""
        found = self.servers()
        entries = [line.split()[1:] for line in self.ask(f"show map {self.routes}").splitlines() if line]
        routes = {entry[0]: int(entry[1]) for entry in entries if len(entry) == 2 and entry[1].isdigit()}
        servers = {number: server for number, (server, _) in found.items()}
        ports = {number: port for number, (_, port) in found.items()}
        salt = self.ask(f"show map {self.salts}").rpartition(" ")[2].rstrip("/")
        return Carried(servers, routes.get("canary", 0), routes.get("limit", 0), salt), ports

    def in_flight(self) -> list[InFlight]:
        """Who waits for an answer or its end. Raises HaproxyFailed."""
        _, *rows = self.ask(f"show table {IN_FLIGHT} data.conn_cur gt 0").splitlines() or [""]
        now = round(time.time() * 1000)
        found = []
        for row in rows:
            values = dict(word.split("=", 1) for word in row.split() if "=" in word)
            if "conn_cur" in values:
                age = ((now - int(values["gpt0"])) % CLOCK_MILLISECONDS) / 1000
                age = age if age < MAX_AGE_SECONDS else 0.0
                number, canary, has_begun = int(values["conn_cur"]), int(values["gpt1"]), values["gpt2"] != "0"
                found.append(InFlight(int(values["key"]), number, age, canary, has_begun, int(values["gpt3"])))
        return found

    def renew(self, lease_seconds: float) -> None:
        """HAProxy itself sends the canary nobody when that is over. Raises HaproxyFailed."""
        until = round((time.time() + lease_seconds) * 1000)
        refusal = self.ask(f"set map {self.routes} until {until}")
        if refusal:
            raise HaproxyFailed(f"{self.path}: the canary's lease was not renewed: {refusal}")

    def carry(self, model: ModelSplit) -> None:
        """Make HAProxy carry the split and read it back. Raises HaproxyFailed when it does not."""
        new = wanted(model)
        answers = {}
        for command in plan(*self.carried(), new):
            of_map = self.salts if command.startswith("set map salt ") else self.routes
            answers[command] = self.ask(command.replace("set map ", f"set map {of_map} "))
        found, _ = self.carried()
        wrong = {n: found.servers.get(n) for n, s in new.servers.items() if not _carries(found.servers.get(n), s)}
        stray = [n for n, server in found.servers.items() if n not in new.servers and server.port is not None]
        if wrong or stray or (found.canary, found.limit, found.salt) != (new.canary, new.limit, new.salt):
            said = "; ".join(f"{c}: {a}" for c, a in answers.items() if a and " salt " not in c)
            raise HaproxyFailed(f"{self.path}: HAProxy does not carry {model.name} as told: {wrong or stray}: {said}")


def _carries(found: Server | None, wanted_server: Server) -> bool:
    if wanted_server.port is None:
        return found is None or found.port is None
    return found == wanted_server
