"""The commands that HAProxy is given, played on a table of servers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mansard.errors import BadInput
from mansard.serving.haproxy.config import config_text
from mansard.serving.haproxy.runtime import Carried, Server, plan, wanted
from mansard.serving.split import Split, with_canary, with_endpoint, with_stable
from mansard.site import Site
from mansard.site_sections import Environment


@dataclass
class Table:
    """HAProxy as far as the commands go."""

    servers: dict[int, Server]
    ports: dict[int, int]
    routes: dict[str, Any]

    def play(self, command: str) -> None:
        words = command.split()
        if words[1] == "map":
            self.routes[words[2]] = words[3] if words[2] == "salt" else int(words[3])
            return
        number = int(words[2].rpartition("v")[2])
        if words[0] == "add":
            self.servers[number] = Server(None, 0)
            self.ports[number] = int(words[3].rpartition(":")[2])
        elif words[0] == "del":
            assert self.servers.pop(number).port is None
        else:
            server = self.servers[number]
            if words[3] == "addr":
                self.ports[number] = int(words[6])
            is_ready = words[4] == "ready" if words[3] == "state" else server.port is not None
            weight = int(words[4]) if words[3] == "weight" else server.weight
            self.servers[number] = Server(self.ports[number] if is_ready else None, weight)

    def carried(self) -> Carried:
        return Carried(dict(self.servers), self.routes["canary"], self.routes["limit"], self.routes["salt"].rstrip("/"))

    def serves_everybody(self) -> bool:
        """Stable answers, and who is sent to the canary finds its server."""
        has_stable = any(s.port is not None and s.weight for s in self.servers.values())
        canary = self.servers.get(self.routes["canary"])
        return has_stable and (not self.routes["limit"] or (canary is not None and canary.port is not None))


@st.composite
def splits(draw: st.DrawFn) -> Split:
    stable = draw(st.integers(1, 4))
    split = with_stable(Split(), "demo", stable, f"http://127.0.0.1:{9000 + stable}", "demo", 1)
    canary = draw(st.integers(1, 4).filter(lambda n: n != stable) | st.none())
    if canary is not None:
        port = 9000 + canary + draw(st.sampled_from([0, 100]))
        split = with_canary(split, "demo", canary, f"http://127.0.0.1:{port}", "demo", draw(st.integers(0, 100)), 1)
    other = draw(st.integers(5, 6))
    endpoint = draw(st.sampled_from([None, f"http://127.0.0.1:{9000 + other}"]))
    return with_endpoint(split, "demo", other, endpoint, "demo")


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(splits(), min_size=1, max_size=5))
def test_after_each_walk_haproxy_carries_the_split_and_somebody_always_served(walk: list[Split]) -> None:
    table = Table({}, {}, {"canary": 0, "limit": 0, "salt": "/"})
    for step, split in enumerate(walk):
        new = wanted(split.models["demo"])
        for command in plan(table.carried(), table.ports, new):
            table.play(command)
            assert step == 0 or table.serves_everybody(), command
        served = {number: server for number, server in new.servers.items() if server.port is not None}
        assert {n: server for n, server in table.servers.items() if server.port is not None} == served
        assert (table.routes["canary"], table.routes["limit"]) == (new.canary, new.limit)
        assert table.serves_everybody()
        assert plan(table.carried(), table.ports, new) == []


def test_a_site_of_several_models_is_refused(tmp_path: Path) -> None:
    here = Environment(tmp_path, tmp_path)
    site = Site(tmp_path / "site.yaml", tmp_path, tmp_path, ("one", "two"), {"m": here}, {})
    with pytest.raises(BadInput, match="serves one model"):
        config_text(site, 8000)


def test_a_home_too_long_for_haproxys_sockets_is_refused_with_the_bytes(tmp_path: Path) -> None:
    home = Path("/" + "h" * 80)
    site = Site(tmp_path / "site.yaml", home, tmp_path, ("one",), {"m": Environment(tmp_path, tmp_path)}, {})
    with pytest.raises(BadInput, match="5 bytes too long for HAProxy's sockets; shorten it"):
        config_text(site, 8000)
