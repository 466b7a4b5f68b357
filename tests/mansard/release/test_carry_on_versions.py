"""A version that is a carry-on names base artifact, branch and alpha, and `why` tells them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save

from flows.cli import main
from mansard.composition.compose import compose
from mansard.composition.description import FILE, BranchDescription
from mansard.composition.shape import shape_of
from mansard.records import Registration
from mansard.release.journal import Journal
from mansard.site import Site
from mansard.store import Store


def test_why_tells_base_branch_and_alpha_of_a_carry_on(
    site: Site,
    journal: Journal,
    store: Store,
    candidate: Callable[..., Registration],
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = store.snapshot(make_checkpoint(depth=2))
    tensors = {"project": numpy.zeros((2, 2), dtype=numpy.float32)}
    metadata = BranchDescription(base, shape_of(32, 8, 1), 1.0).metadata()
    (tmp_path / "branch").mkdir()
    (tmp_path / "branch" / FILE).write_bytes(save(tensors, metadata=metadata))
    branch = store.snapshot(tmp_path / "branch")
    artifact = compose(store, base, branch, 0.75)
    journal.register(candidate(artifact=artifact, model=base, base_version=None), None)
    assert main(["why", "1", "--model", "demo", "--site", str(site.path)]) == 0
    text = capsys.readouterr().out
    assert f"  carry-on: branch {branch[:12]} on base artifact {base[:12]} at alpha 0.75\n" in text
    main(["why", "1", "--model", "demo", "--site", str(site.path), "--json"])
    (link,) = json.loads(capsys.readouterr().out)["chain"]
    assert link["carry_on"] == {"base": base, "branch": branch, "alpha": 0.75}
