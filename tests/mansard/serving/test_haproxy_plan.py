"""The commands that HAProxy is given, played on a table of servers."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mansard.errors import BadInput
from mansard.serving.haproxy_config import config_text
from mansard.serving.haproxy_runtime import Server, plan, wanted_servers
from mansard.serving.split import Split, with_canary, with_endpoint, with_stable
from mansard.site import Environment, Site

Table = dict[int, tuple[Server, int]]


def played(present: Table, commands: list[str]) -> tuple[Table, int]:
    """The table after the commands, and the least total weight on the way, once somebody had weight."""
    table, least = dict(present), 10**6
    for command in commands:
        words = command.split()
        number = int(words[2].rpartition("v")[2])
        if words[0] == "add":
            table[number] = (Server(None, int(words[7])), int(words[3].rpartition(":")[2]))
        elif words[0] == "del":
            assert table.pop(number)[0].port is None
        else:
            server, port = table[number]
            if words[3] == "addr":
                table[number] = (Server(int(words[6]) if server.port else None, server.weight), int(words[6]))
            elif words[3] == "weight":
                table[number] = (Server(server.port, int(words[4])), port)
            else:
                table[number] = (Server(port if words[4] == "ready" else None, server.weight), port)
        weight = sum(server.weight for server, _ in table.values() if server.port is not None)
        least = min(least, weight) if weight or least < 10**6 else least
    return table, least


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
    table: Table = {}
    for step, split in enumerate(walk):
        wanted = wanted_servers(split.models["demo"])
        table, least = played(table, plan(table, wanted))
        with_engine = {n: server for n, server in wanted.items() if server.port is not None}
        assert {n: server for n, (server, _) in table.items() if server.port is not None} == with_engine
        assert sum(server.weight for server in with_engine.values()) == 200
        assert step == 0 or least > 0
        assert plan(table, wanted) == []


def test_a_site_of_several_models_is_refused(tmp_path: Path) -> None:
    here = Environment(tmp_path, tmp_path)
    site = Site(tmp_path / "site.yaml", tmp_path, tmp_path, ("one", "two"), {"m": here}, {})
    with pytest.raises(BadInput, match="serves one model"):
        config_text(site, 8000)
