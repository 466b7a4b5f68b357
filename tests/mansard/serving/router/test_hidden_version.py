"""While a canary runs nobody but an operator can tell from an answer which side gave it; on both data planes."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.free_ports import free_port

pytestmark = pytest.mark.slow

TOKEN = "0123456789abcdef"
PLANES = (("workers", "router.worker"), ("haproxy", "haproxy.driver"))


@pytest.fixture(params=PLANES, ids=[plane for plane, _ in PLANES])
def hiding(request: pytest.FixtureRequest, tmp_path: Path, make_rig: Callable[..., Any]) -> Iterator[Any]:
    """A rig whose site has one operator's token and the usual `show_version`."""
    plane, module = request.param
    (tmp_path / "tokens.yaml").write_text(f'ada: "{hashlib.sha256(TOKEN.encode()).hexdigest()}"\n')
    lines = f"router: {{plane: {plane}}}\noperator_tokens: tokens.yaml\n"
    with make_rig(site_lines=lines, module=module, port=free_port()) as rig:
        yield rig
        rig.worker.terminate()  # HAProxy outlives a driver that is killed
        rig.worker.wait(60)


def test_only_an_operator_sees_and_pins_versions_while_a_canary_runs(hiding: Any) -> None:
    hiding.write(50)
    replies = [hiding.call(x_user_id=f"user-{number}") for number in range(40)]
    assert {reply.text for reply in replies} == {"one", "two"}  # the stand-in engines' own words
    assert {reply.version for reply in replies} == {None}
    assert len({tuple(sorted(set(reply.headers) - {"date"})) for reply in replies}) == 1
    assert hiding.call(x_mansard_version="2").status == 403
    assert hiding.call(x_mansard_version="2", x_mansard_operator="wrong").status == 403
    assert hiding.call(x_mansard_operator="wrong").version is None
    for version, text in (("1", "one"), ("2", "two")):
        reply = hiding.call(x_mansard_version=version, x_mansard_operator=TOKEN)
        assert (reply.status, reply.text, reply.version) == (200, text, version)
    hiding.write(None)
    assert (hiding.call().version, hiding.call(x_mansard_version="1").status) == ("1", 200)
