"""Following a rollout while the host is away."""

import itertools
from pathlib import Path

import pytest

from mansard.serving.client import HostDown
from mansard.site import Site
from mansard.site_sections import Environment
from tasks.canary import _Watch


def test_a_follower_says_that_the_host_is_down_and_gives_up_at_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = Site(tmp_path / "site.yaml", tmp_path, tmp_path, ("demo",), {"m": Environment(tmp_path, tmp_path)}, {})
    hours = itertools.count(0, 3600)
    with pytest.raises(HostDown, match="mansard up"):
        _Watch(site, "demo", lambda: float(next(hours))).look()
    told = capsys.readouterr()
    assert "mansard up goes on with the rollout" in told.out + told.err
