"""A storey is taken away where nothing above was trained on it, and the model is then what it was without it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from mansard.errors import BadInput
from mansard.models.expand import apply, plan
from mansard.models.families import LLAMA
from mansard.models.fuse import TRAINED_FILE, fuse
from mansard.models.model_files import model_config, weight_files
from mansard.models.remove_storey import remove_storey
from mansard.models.storeys import EXPANSION_FILE, read_expansion
from mansard.specs.surgery import Expand
from mansard.store.snapshot import check_model_tree
from mansard.store.store import Store

MakeCheckpoint = Callable[..., Path]


def expand(store: Store, base: str, *positions: int) -> str:
    return apply(store, base, plan(model_config(store, base), Expand(blocks=len(positions), positions=list(positions))))


def tensors(store: Store, model: str) -> dict[str, str]:
    return {n: d for f in weight_files(store.manifest(model)).values() for n, d in f.tensors.items()}


def trained(store: Store, model: str, folder: Path, blocks: list[int], seed: int = 1) -> str:
    """The model fused with random tensors in these blocks."""
    random = np.random.default_rng(seed)
    found: dict[str, Any] = {}
    for file in sorted(store.materialize(model).glob("*.safetensors")):
        found |= {n: t for n, t in load_file(file).items() if (p := LLAMA.split(n)) and p[0] in blocks}
    made = {n: random.standard_normal(t.shape).astype(t.dtype) for n, t in found.items()}
    folder.mkdir()
    (folder / TRAINED_FILE).write_bytes(save(made))
    return fuse(store, model, store.snapshot(folder))


@pytest.mark.parametrize("shards", [1, 3])
def test_the_only_storey_leaves_the_base(
    store: Store, make_checkpoint: MakeCheckpoint, tmp_path: Path, shards: int
) -> None:
    base = store.snapshot(make_checkpoint(depth=3, shards=shards, layer_types=["a", "b", "c"]))
    fused = trained(store, expand(store, base, 0, 2), tmp_path / "trained", [1, 4])
    back = remove_storey(store, fused, 1)
    assert tensors(store, back) == tensors(store, base)
    assert model_config(store, back) == model_config(store, base)
    assert EXPANSION_FILE not in store.manifest(back).files
    check_model_tree(store.materialize(back))


def test_the_newest_storey_leaves_the_ones_below(store: Store, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    base = store.snapshot(make_checkpoint(depth=3))
    first = trained(store, expand(store, base, 1), tmp_path / "first", [2])
    second = trained(store, expand(store, first, 0, 2), tmp_path / "second", [1, 4], seed=2)
    assert remove_storey(store, second, 2) == first


def test_a_storey_below_a_silent_one_goes(store: Store, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    base = store.snapshot(make_checkpoint(depth=3))
    first = trained(store, expand(store, base, 1), tmp_path / "first", [2])
    second = expand(store, first, 0, 3)
    assert remove_storey(store, second, 1) == expand(store, base, 0, 2)


def test_a_storey_between_goes(store: Store, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    base = store.snapshot(make_checkpoint(depth=2))
    first = trained(store, expand(store, base, 1), tmp_path / "first", [2])
    third = expand(store, trained(store, expand(store, first, 0), tmp_path / "second", [1]), 3)
    back = remove_storey(store, third, 2)
    assert back == expand(store, first, 2)
    assert [s.depth_before for s in read_expansion(store, back).storeys] == [2, 3]


def test_a_storey_below_a_trained_one_stays(store: Store, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    first = trained(store, expand(store, store.snapshot(make_checkpoint(depth=3)), 1), tmp_path / "first", [2])
    second = trained(store, expand(store, first, 0), tmp_path / "second", [1])
    before = store.snapshots()
    with pytest.raises(BadInput, match="storey 2 was trained on it; remove storey 2 first"):
        remove_storey(store, second, 1)
    assert store.snapshots() == before


def test_a_storey_that_a_silent_one_copies_stays(store: Store, make_checkpoint: MakeCheckpoint) -> None:
    first = expand(store, store.snapshot(make_checkpoint(depth=3)), 1)
    with pytest.raises(BadInput, match="block 3 of storey 2 is a copy of one of its blocks"):
        remove_storey(store, expand(store, first, 2), 1)


def test_a_storey_that_trained_with_its_base_stays(
    store: Store, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    expansion = expand(store, store.snapshot(make_checkpoint(depth=3)), 1)
    fused = trained(store, expansion, tmp_path / "trained", [0, 2])
    assert read_expansion(store, fused).storeys[0].has_trained_base
    with pytest.raises(BadInput, match="its training changed tensors below it"):
        remove_storey(store, fused, 1)


@pytest.mark.parametrize("storey", [0, 2, -1])
def test_a_storey_that_is_not_there_is_refused(store: Store, make_checkpoint: MakeCheckpoint, storey: int) -> None:
    first = expand(store, store.snapshot(make_checkpoint(depth=3)), 1)
    with pytest.raises(BadInput, match="has storeys 1 to 1"):
        remove_storey(store, first, storey)


def test_a_model_without_storeys_is_refused(store: Store, make_checkpoint: MakeCheckpoint) -> None:
    with pytest.raises(BadInput, match="has no storeys"):
        remove_storey(store, store.snapshot(make_checkpoint(depth=3)), 1)
