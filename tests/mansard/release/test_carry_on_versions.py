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
from mansard.store.store import Store
from tasks.bound_branches import bound_branches


def branch_on(store: Store, base: str, folder: Path) -> str:
    """The artifact of a branch that says nothing, on `base`."""
    tensors = {"project": numpy.zeros((2, 2), dtype=numpy.float32)}
    metadata = BranchDescription(base, shape_of(32, 8, 1), 1.0).metadata()
    folder.mkdir()
    (folder / FILE).write_bytes(save(tensors, metadata=metadata))
    return compose(store, base, store.snapshot(folder), 0.75)


def test_a_release_lists_the_branches_that_stay_on_the_base_it_leaves(
    site: Site,
    journal: Journal,
    store: Store,
    candidate: Callable[..., Registration],
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    base = store.snapshot(make_checkpoint(depth=2))
    branch = branch_on(store, base, tmp_path / "branch")
    journal.register(candidate(artifact=branch, model=base, base_version=None), None)
    journal.start_rollout("demo", 1, "otto", "", journal.pointers("demo"))
    journal.step("demo", 1, 100, "host", "", journal.pointers("demo"))
    journal.promote("demo", 1, "host", "all steps pass", journal.pointers("demo"))
    journal.register(candidate("two", artifact=branch, model=base), None)
    journal.register(candidate("three"), None)
    assert bound_branches(site, "demo", 2) == [], "the same base"
    (found,) = bound_branches(site, "demo", 3)
    assert (found.version, found.is_stable, found.base) == (1, True, base)
    assert f"base {base[:12]}, which version 3 is not" in found.text(3)


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
    artifact = branch_on(store, base, tmp_path / "branch")
    branch = store.snapshot(tmp_path / "branch")
    journal.register(candidate(artifact=artifact, model=base, base_version=None), None)
    assert main(["why", "1", "--model", "demo", "--site", str(site.path)]) == 0
    text = capsys.readouterr().out
    assert f"  carry-on: branch {branch[:12]} on base artifact {base[:12]} at alpha 0.75\n" in text
    main(["why", "1", "--model", "demo", "--site", str(site.path), "--json"])
    (link,) = json.loads(capsys.readouterr().out)["chain"]
    assert link["carry_on"] == {"base": base, "branch": branch, "alpha": 0.75}
