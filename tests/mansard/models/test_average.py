"""Fusion by average: at the old depth, tensor by tensor, and no storey of it can be taken away."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from mansard.errors import BadInput
from mansard.models.expand import apply, plan
from mansard.models.families import FAMILIES, LLAMA
from mansard.models.fuse import TRAINED_FILE, fuse
from mansard.models.model_files import model_config, weight_files
from mansard.models.remove_storey import remove_storey
from mansard.models.storeys import EXPANSION_FILE, read_expansion, told_storeys
from mansard.release.oncall_text import _storey_line
from mansard.specs.surgery import Expand
from mansard.store.snapshot import check_model_tree
from mansard.store.store import Store

pytestmark = pytest.mark.slow

MakeCheckpoint = Callable[..., Path]
MakeContext = Callable[..., Any]


def expand(store: Store, base: str, *positions: int) -> str:
    wish = Expand(blocks=len(positions), positions=list(positions))
    return apply(store, base, plan(model_config(store, base), wish))


def load(store: Store, model: str) -> dict[str, np.ndarray]:
    tree = store.materialize(model)
    return {name: tensor for file in sorted(tree.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def fused(store: Store, base: str, positions: list[int], folder: Path, also: str = "") -> str:
    """An expansion with random tensors in its newest storey, and in `also` where it is named."""
    expansion = expand(store, base, *positions)
    new = {block.index for block in read_expansion(store, expansion).new_blocks}
    random = np.random.default_rng(1)
    trained = {
        name: random.standard_normal(tensor.shape).astype(tensor.dtype)
        for name, tensor in load(store, expansion).items()
        if name == also or ((place := LLAMA.split(name)) and place[0] in new)
    }
    folder.mkdir()
    (folder / TRAINED_FILE).write_bytes(save(trained))
    return fuse(store, expansion, store.snapshot(folder))


def average(store: Store, model: str, weight: float) -> str:
    from mansard.models.average import average

    return average(store, model, weight)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("weight", [0.5, 0.1, 1.0])
def test_each_new_block_is_averaged_into_the_one_it_copied(
    store: Store, make_checkpoint: MakeCheckpoint, tmp_path: Path, shards: int, weight: float
) -> None:
    base = store.snapshot(make_checkpoint(depth=4, shards=shards))
    expanded = fused(store, base, [1, 3], tmp_path / "trained")
    made = average(store, expanded, weight)
    check_model_tree(store.materialize(made))
    assert model_config(store, made) == model_config(store, base)
    assert EXPANSION_FILE not in store.manifest(made).files
    before, deep, after = (load(store, model) for model in (base, expanded, made))
    assert after.keys() == before.keys()
    new_of = {1: 2, 3: 5}  # block of the base -> its new block in the expansion
    for name, tensor in after.items():
        block, inner = LLAMA.split(name) or (-1, "")
        if block in new_of:
            new = deep[LLAMA.block_tensor(new_of[block], inner)]
            mean = (1 - weight) * before[name].astype(np.float32) + weight * new.astype(np.float32)
            assert np.array_equal(tensor, mean.astype(tensor.dtype)), name
        else:
            assert np.array_equal(tensor, before[name]), name


def test_a_source_that_trained_too_is_averaged_as_it_was_trained(
    store: Store, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    expanded = fused(store, store.snapshot(make_checkpoint(depth=2)), [0], tmp_path / "trained", also=name)
    deep, after = load(store, expanded), load(store, average(store, expanded, 0.5))
    source, new = (deep[n].astype(np.float32) for n in (name, "model.layers.1.mlp.down_proj.weight"))
    assert np.array_equal(after[name], (0.5 * source + 0.5 * new).astype(after[name].dtype))


def test_storeys_below_an_averaged_one_stay_and_cannot_be_taken_away(
    store: Store, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    first = fused(store, store.snapshot(make_checkpoint(depth=2)), [0], tmp_path / "first")
    made = average(store, fused(store, first, [2], tmp_path / "second"), 0.5)
    (below,) = read_expansion(store, made).storeys
    assert below.new_blocks == read_expansion(store, first).new_blocks and below.is_averaged_over
    (told,) = told_storeys(store, made)
    line = _storey_line({**told, "added_by": 2})
    assert line == "storey 1: block 1, added by version 2, a later storey was averaged into the model"
    with pytest.raises(BadInput, match="storey 1 cannot be removed: a later storey was averaged into this model"):
        remove_storey(store, made, 1)
    above = expand(store, made, 1)  # the next storey remembers it, and can itself be taken away
    assert [s.is_averaged_over for s in read_expansion(store, above).storeys] == [True, False]
    assert remove_storey(store, above, 2) == made
    with pytest.raises(BadInput, match="a later storey was averaged"):
        remove_storey(store, above, 1)


def test_a_model_without_storeys_is_refused(store: Store, make_checkpoint: MakeCheckpoint) -> None:
    with pytest.raises(BadInput, match="has no storeys: there is nothing to average"):
        average(store, store.snapshot(make_checkpoint(depth=2)), 0.5)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_averages_to_a_plain_model_of_the_old_depth(
    make_context: MakeContext, make_family: Callable[..., Path], model_type: str
) -> None:
    """An untrained storey: copied tensors stay what they were, the silent ones are halved."""
    from mansard.models import average_stage
    from mansard.models.families import family_of
    from mansard.models.loading import load_model

    store: Store = make_context({}, {}).store
    base = store.snapshot(make_family(model_type, dtype="bfloat16"))
    expansion = expand(store, base, 1)
    made = average_stage.run(make_context({"model": expansion}, {"weight": 0.5}))
    assert load_model(store.materialize(made), None).config.num_hidden_layers == 3
    before, after = (
        {n: d for f in weight_files(store.manifest(m)).values() for n, d in f.tensors.items()} for m in (base, made)
    )
    family = family_of(model_config(store, base))
    silent = {n for n in before if (p := family.split(n)) and p[0] == 1 and family.silent_value(p[1]) is not None}
    assert {n for n in before if before[n] != after[n]} == silent
