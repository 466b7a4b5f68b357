"""Following a rollout while the host is away."""

import contextlib
import http.server
import itertools
import json
import shutil
import socketserver
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mansard.errors import MansardError
from mansard.serving.client import HostDown
from mansard.site import Site
from mansard.site_sections import Environment
from tasks.canary import _Watch

WALK = {"state": "canary", "version": 2, "step": 1, "steps": 2, "weight_percent": 5, "reason": ""}


@pytest.fixture
def short_site() -> Iterator[Site]:
    """A socket's path has at most 107 bytes."""
    home = Path(tempfile.mkdtemp(prefix="mansard-"))
    (home / "run").mkdir()
    yield Site(home / "site.yaml", home, home, ("demo",), {"m": Environment(home, home)}, {})
    shutil.rmtree(home)


@contextlib.contextmanager
def answering(path: Path, answer: dict[str, object]) -> Iterator[None]:
    """A host on the socket that gives this one answer."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: object) -> None: ...

    with socketserver.ThreadingUnixStreamServer(str(path), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()


def test_a_follower_says_that_the_host_is_down_and_gives_up_at_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = Site(tmp_path / "site.yaml", tmp_path, tmp_path, ("demo",), {"m": Environment(tmp_path, tmp_path)}, {})
    hours = itertools.count(0, 3600)
    with pytest.raises(HostDown, match="mansard up"):
        _Watch(site, "demo", lambda: float(next(hours))).look()
    told = capsys.readouterr()
    assert "mansard up goes on with the rollout" in told.out + told.err


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"format": 1}, "no state"),
        ({**WALK, "step": "1"}, "step '1'"),
        ({**WALK, "steps": None}, "steps None"),
        ({key: value for key, value in WALK.items() if key != "weight_percent"}, "no weight_percent"),
    ],
)
def test_an_answer_of_another_form_is_one_line(short_site: Site, answer: dict[str, object], message: str) -> None:
    with answering(short_site.host_socket, answer), pytest.raises(MansardError, match=message) as caught:
        _Watch(short_site, "demo", time.monotonic).look()
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1
