"""The storeys of a version, as the commands tell them; why one may not be taken away is told before anything starts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import load_file, save

from flows.cli import main
from mansard.models.expand import apply, plan
from mansard.models.families import LLAMA
from mansard.models.fuse import TRAINED_FILE, fuse
from mansard.models.model_files import model_config
from mansard.models.storeys import EXPANSION_FILE, read_expansion
from mansard.records import Registration
from mansard.release.journal import Journal
from mansard.site import Site
from mansard.specs.surgery import Expand
from mansard.store.snapshot import Blob, Manifest
from mansard.store.store import Store


def upgraded(store: Store, model: str, folder: Path, *positions: int) -> str:
    """The model with a storey after these blocks, trained (with random numbers) and fused."""
    expand = Expand(blocks=len(positions), positions=list(positions))
    expansion = apply(store, model, plan(model_config(store, model), expand))
    blocks = {b.index for b in read_expansion(store, expansion).new_blocks}
    random, made = numpy.random.default_rng(len(positions)), {}
    for name, tensor in load_file(store.materialize(expansion) / "model.safetensors").items():
        place = LLAMA.split(name)
        if place is not None and place[0] in blocks:
            made[name] = random.standard_normal(tensor.shape).astype(tensor.dtype)
    folder.mkdir()
    (folder / TRAINED_FILE).write_bytes(save(made))
    return fuse(store, expansion, store.snapshot(folder))


@pytest.fixture
def three_versions(
    site: Site,
    journal: Journal,
    store: Store,
    candidate: Callable[..., Registration],
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> Site:
    """A base, a storey on it, and a storey on that."""
    base = store.snapshot(make_checkpoint(depth=3))
    first = upgraded(store, base, tmp_path / "first", 1)
    second = upgraded(store, first, tmp_path / "second", 0, 2)
    for number, model in enumerate((base, first, second)):
        made = candidate(f"v{number}", model=model, base_version=number or None)
        assert journal.register(made, None) == number + 1
    return site


def run(site: Site, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main([*words, "--model", "demo", "--site", str(site.path)])
    told = capsys.readouterr()
    return status, told.out, told.err.strip()


def test_why_tells_the_storeys_and_which_version_added_each(
    three_versions: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(three_versions, capsys, "why", "3", "--json")
    assert status == 0
    links: list[dict[str, Any]] = json.loads(out)["chain"]
    told = [[(s["storey"], s["blocks"], s["added_by"]) for s in link["storeys"]] for link in links]
    assert told == [[(1, [3], 2), (2, [1, 4], 3)], [(1, [2], 2)], []]
    _, text, _ = run(three_versions, capsys, "why", "3")
    assert "  storey 1: block 3, added by version 2\n  storey 2: blocks 1, 4, added by version 3\n" in text


def test_a_damaged_record_of_storeys_is_a_problem_that_why_tells(
    site: Site,
    journal: Journal,
    store: Store,
    candidate: Callable[..., Registration],
    make_checkpoint: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = dict(store.manifest(store.snapshot(make_checkpoint(depth=2))).files)
    files[EXPANSION_FILE] = Blob(store.put_bytes(b"{}"), 2)
    journal.register(candidate(model=store.put_manifest(Manifest(files)), base_version=None), None)
    status, text, _ = run(site, capsys, "why", "1")
    assert status == 0 and "problem: storeys of version 1: " in text and EXPANSION_FILE in text


@pytest.mark.parametrize(
    ("version", "storey", "words"),
    [
        ("3", "1", "storey 1 cannot be removed: storey 2 was trained on it; remove storey 2 first"),
        ("3", "3", "has storeys 1 to 2"),
        ("1", "1", "has no storeys: it is a base"),
        ("9", "1", "no version 9"),
    ],
)
def test_a_storey_that_cannot_go_is_one_line_and_exit_2_before_anything_starts(
    three_versions: Site,
    store: Store,
    capsys: pytest.CaptureFixture[str],
    version: str,
    storey: str,
    words: str,
) -> None:
    before = store.snapshots()
    status, _, told = run(three_versions, capsys, "remove-storey", version, storey, "--as", "ada")
    assert status == 2
    assert told.startswith("mansard remove-storey: ") and words in told and "\n" not in told
    assert store.snapshots() == before


def test_only_an_author_takes_a_storey_away(three_versions: Site, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, told = run(three_versions, capsys, "remove-storey", "3", "2", "--as", "grace")
    assert status == 5 and "grace" in told and "\n" not in told
