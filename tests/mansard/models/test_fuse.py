from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from mansard.errors import BadInput
from mansard.models.expand import apply, plan
from mansard.models.families import LLAMA
from mansard.models.fuse import TRAINED_FILE, fuse
from mansard.models.model_files import model_config
from mansard.models.storeys import EXPANSION_FILE
from mansard.specs.surgery import Expand
from mansard.store.snapshot import check_model_tree
from mansard.store.store import Store

MakeCheckpoint = Callable[..., Path]
Tensors = dict[str, np.ndarray]


def expand(store: Store, base: str, blocks: int, positions: Any = "even") -> str:
    return apply(store, base, plan(model_config(store, base), Expand(blocks=blocks, positions=positions)))


def load(tree: Path) -> Tensors:
    return {name: tensor for file in sorted(tree.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def trained_tensors(tensors: Tensors, blocks: list[int], seed: int = 1) -> Tensors:
    random = np.random.default_rng(seed)
    names = [n for n in sorted(tensors) if (place := LLAMA.split(n)) and place[0] in blocks]
    return {n: random.standard_normal(tensors[n].shape).astype(tensors[n].dtype) for n in names}


def put_trained(store: Store, tensors: Tensors, folder: Path) -> str:
    folder.mkdir()
    (folder / TRAINED_FILE).write_bytes(save(tensors))
    (folder / "training.json").write_text("{}")
    return store.snapshot(folder)


def object_bytes(store: Store) -> int:
    return sum(p.stat().st_size for p in (store.root / "objects").rglob("*") if p.is_file())


@pytest.mark.parametrize("shards", [1, 3])
def test_a_fused_model_holds_the_trained_tensors_and_nothing_else_new(
    store: Store, make_checkpoint: MakeCheckpoint, tmp_path: Path, shards: int
) -> None:
    expansion = expand(store, store.snapshot(make_checkpoint(depth=4, shards=shards)), 2)
    before = load(store.materialize(expansion))
    new = trained_tensors(before, [2, 5])
    fused = fuse(store, expansion, put_trained(store, new, tmp_path / "trained"))
    out = store.materialize(fused)
    check_model_tree(out)
    after = load(out)
    assert list(after) == list(before)
    assert all(np.array_equal(after[n], new.get(n, before[n])) for n in after)
    assert store.manifest(fused).files.keys() == store.manifest(expansion).files.keys()
    assert expand(store, fused, 1)  # the next storey stands on it


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(depth=st.integers(1, 5), data=st.data())
def test_a_fused_model_after_its_base_adds_only_the_new_tensors_bytes(
    make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory, depth: int, data: st.DataObject
) -> None:
    positions = data.draw(st.lists(st.integers(0, depth - 1), min_size=1, max_size=depth, unique=True))
    folder = tmp_path_factory.mktemp("case")
    made, store = Store(folder / "made"), Store(folder / "store")
    expansion = expand(made, made.snapshot(make_checkpoint(depth=depth)), len(positions), positions)
    tensors = load(made.materialize(expansion))
    blocks = [p + 1 + i for i, p in enumerate(sorted(positions))]
    new = trained_tensors(tensors, blocks)
    fused = fuse(made, expansion, put_trained(made, new, folder / "trained"))
    # A store that has only the base takes the fused model.
    base = make_checkpoint(depth=depth)
    store.snapshot(base)
    before = object_bytes(store)
    taken = store.snapshot(made.materialize(fused))
    small = sum(store.manifest(taken).files[name].size_bytes for name in ("config.json", EXPANSION_FILE))
    assert taken == fused
    assert object_bytes(store) - before == sum(t.nbytes for t in new.values()) + small


def test_trained_tensors_of_the_base_are_taken_too(
    store: Store, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    expansion = expand(store, store.snapshot(make_checkpoint(depth=2)), 1, [0])
    before = load(store.materialize(expansion))
    new = trained_tensors(before, [0, 1, 2])
    new["model.norm.weight"] = before["model.norm.weight"] + 1
    after = load(store.materialize(fuse(store, expansion, put_trained(store, new, tmp_path / "trained"))))
    assert all(np.array_equal(after[n], new.get(n, before[n])) for n in after)


def test_only_the_newest_storey_must_be_trained(store: Store, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    second = expand(store, expand(store, store.snapshot(make_checkpoint(depth=2)), 1, [0]), 1, [2])
    new = trained_tensors(load(store.materialize(second)), [3])
    fuse(store, second, put_trained(store, new, tmp_path / "trained"))


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.down_proj.weight"),
            "'model.layers.1.mlp.down_proj.weight' of a new block",
        ),
        (lambda t: t.update({"model.layers.9.x": np.zeros(1)}), "'model.layers.9.x' is not in snapshot"),
        (lambda t: t.update({"lm_head.bias": np.zeros(1)}), "'lm_head.bias' is not in snapshot"),
        (lambda t: t.update({k: t[k].astype(np.float32) for k in list(t)[:1]}), "is F32 .* the model has F16"),
        (lambda t: t.update({k: t[k].reshape(1, -1) for k in list(t)[:1]}), "the model has F16"),
    ],
)
def test_trained_tensors_unlike_the_model_are_refused(
    store: Store,
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    edit: Callable[[Tensors], object],
    complaint: str,
) -> None:
    expansion = expand(store, store.snapshot(make_checkpoint(depth=2)), 1, [0])
    new = trained_tensors(load(store.materialize(expansion)), [1])
    edit(new)
    with pytest.raises(BadInput, match=complaint):
        fuse(store, expansion, put_trained(store, new, tmp_path / "trained"))


def test_snapshots_of_another_kind_are_refused(store: Store, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    base = store.snapshot(make_checkpoint(depth=2))
    expansion = expand(store, base, 1)
    new = trained_tensors(load(store.materialize(expansion)), [2])
    with pytest.raises(BadInput, match=TRAINED_FILE):
        fuse(store, expansion, base)
    with pytest.raises(BadInput, match=EXPANSION_FILE):
        fuse(store, base, put_trained(store, new, tmp_path / "trained"))
