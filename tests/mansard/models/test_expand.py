import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from mansard.errors import BadInput
from mansard.models.expand import apply, plan
from mansard.models.families import LLAMA
from mansard.models.model_files import model_config
from mansard.models.storeys import EXPANSION_FILE, read_expansion
from mansard.specs.surgery import Expand
from mansard.store.snapshot import check_model_tree
from mansard.store.store import Store

MakeCheckpoint = Callable[..., Path]
INDEX = "model.safetensors.index.json"


def llama(depth: int) -> dict[str, Any]:
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": depth}


def expand(store: Store, base: str, blocks: int, positions: Any = "even") -> str:
    return apply(store, base, plan(model_config(store, base), Expand(blocks=blocks, positions=positions)))


def load(tree: Path) -> dict[str, np.ndarray]:
    return {name: tensor for file in sorted(tree.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def new_bytes(store: Store, base: str, made: str) -> int:
    """Bytes on the disk of the objects that `made` has and `base` has not."""
    old = {digest for _, _, digest, _ in store.manifest(base).objects()}
    new = {digest for _, _, digest, _ in store.manifest(made).objects()} - old
    return sum((store.root / "objects" / d[:2] / d).stat().st_blocks * 512 for d in new)


@given(st.integers(1, 40).flatmap(lambda depth: st.tuples(st.just(depth), st.integers(1, depth))))
def test_even_positions_split_any_depth_into_groups_of_almost_one_size(case: tuple[int, int]) -> None:
    depth, blocks = case
    made = plan(llama(depth), Expand(blocks=blocks))
    assert made.depth == depth + blocks
    assert [made.sources[i] for i in made.renames] == list(range(depth))
    assert all(made.sources[b.index - 1] == made.sources[b.index] == b.source for b in made.new_blocks)
    ends = [b.source for b in made.new_blocks]
    sizes = np.diff([-1, *ends])
    assert ends[-1] == depth - 1
    assert sizes.max() - sizes.min() <= 1


@given(
    st.integers(1, 30).flatmap(
        lambda depth: st.tuples(
            st.just(depth), st.lists(st.integers(0, depth - 1), min_size=1, max_size=depth, unique=True)
        )
    )
)
def test_listed_positions_are_taken_in_any_order(case: tuple[int, list[int]]) -> None:
    depth, positions = case
    made = plan(llama(depth), Expand(blocks=len(positions), positions=positions))
    assert made == plan(llama(depth), Expand(blocks=len(positions), positions=sorted(positions)))
    assert [b.source for b in made.new_blocks] == sorted(positions)
    assert [made.sources[i] for i in made.renames] == list(range(depth))


def test_positions_of_llama_pro_are_even() -> None:
    made = plan(llama(32), Expand(blocks=8))
    assert [b.index for b in made.new_blocks] == [4, 9, 14, 19, 24, 29, 34, 39]


@pytest.mark.parametrize(("depth", "blocks", "sources"), [(32, 4, [19, 23, 27, 31]), (5, 2, [3, 4]), (1, 1, [0])])
def test_upper_half_is_even_among_the_upper_blocks(depth: int, blocks: int, sources: list[int]) -> None:
    made = plan(llama(depth), Expand(blocks=blocks, positions="upper-half"))
    assert [b.source for b in made.new_blocks] == sources
    assert min(b.source for b in made.new_blocks) >= depth // 2


@pytest.mark.parametrize(
    ("blocks", "positions", "complaint"),
    [
        (5, "even", "1 to 4 can be even"),
        (3, "upper-half", "in a model of 4 blocks; 1 to 2 can be upper-half"),
        (1, [4], "0 to 3 are its blocks"),
        (2, [0, 99], "99 in a model of 4 blocks"),
    ],
)
def test_positions_outside_the_model_are_refused(blocks: int, positions: Any, complaint: str) -> None:
    with pytest.raises(BadInput, match=complaint):
        plan(llama(4), Expand(blocks=blocks, positions=positions))


def test_another_family_is_refused() -> None:
    with pytest.raises(BadInput, match=r"'mamba'.*supported: llama"):
        plan({**llama(4), "model_type": "mamba"}, Expand(blocks=1))


@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_an_expansion_holds_the_base_and_blocks_that_add_nothing(
    store: Store, make_checkpoint: MakeCheckpoint, shards: int, options: dict[str, Any]
) -> None:
    tree = make_checkpoint(depth=4, shards=shards, layer_types=["a", "b", "c", "d"], **options)
    base = store.snapshot(tree)
    made = expand(store, base, 3)
    out = store.materialize(made)
    check_model_tree(out)
    old, new = load(tree), load(out)
    config = json.loads((out / "config.json").read_text())
    sources = [0, 1, 1, 2, 2, 3, 3]
    copies = [2, 4, 6]
    assert config["num_hidden_layers"] == 7
    assert config["layer_types"] == ["a", "b", "b", "c", "c", "d", "d"]
    assert new.keys() == set(LLAMA.outer_tensors(config)) | {
        LLAMA.block_tensor(i, n) for i in range(7) for n in LLAMA.block_tensors(config, 0)
    }
    for name, tensor in new.items():
        place = LLAMA.split(name)
        was = old[name if place is None else LLAMA.block_tensor(sources[place[0]], place[1])]
        is_zeroed = place is not None and place[0] in copies and place[1].startswith(("self_attn.o_", "mlp.down_"))
        assert tensor.dtype == was.dtype
        assert np.array_equal(tensor, np.zeros_like(was) if is_zeroed else was), name
    if shards > 1:
        index = json.loads((out / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in new.values())
        assert index["metadata"]["total_parameters"] == sum(t.size for t in new.values())


def test_an_expansion_adds_no_tensor_bytes(store: Store, make_checkpoint: MakeCheckpoint) -> None:
    base = store.snapshot(make_checkpoint(depth=4, shards=2))
    made = expand(store, base, 4)
    files = store.manifest(made).files
    small = [files[name].size_bytes for name in ("config.json", INDEX, EXPANSION_FILE)]
    assert new_bytes(store, base, made) <= sum(-(-size // 4096) * 4096 for size in small)


def test_an_expansion_keeps_other_files_and_old_constants(store: Store, make_checkpoint: MakeCheckpoint) -> None:
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    extra = {name.format(i): np.full(4, i, np.float32) for i in range(3)}
    tree = make_checkpoint(depth=3, extra_tensors=extra)
    (tree / "sub").mkdir()
    (tree / "sub/merges.txt").write_text("a b")
    out = store.materialize(expand(store, store.snapshot(tree), 1, [1]))
    assert (out / "sub/merges.txt").read_text() == "a b"
    assert [load(out)[name.format(i)][0] for i in range(4)] == [0, 1, 1, 2]


def test_the_same_expansion_is_the_same_snapshot(store: Store, make_checkpoint: MakeCheckpoint) -> None:
    base = store.snapshot(make_checkpoint(depth=4))
    assert expand(store, base, 2) == expand(store, base, 2, [3, 1])
    assert expand(store, base, 2) != expand(store, base, 2, [0, 1])


def test_storeys_stack(store: Store, make_checkpoint: MakeCheckpoint) -> None:
    base = store.snapshot(make_checkpoint(depth=3))
    first = expand(store, base, 1, [1])
    second = expand(store, first, 2, [0, 2])
    record = json.loads(store.read_file(second, EXPANSION_FILE))
    assert record == {
        "format": 1,
        "depth": 6,
        "new_blocks": [{"index": 1, "source": 0}, {"index": 4, "source": 2}],
        "storeys": [
            {"depth_before": 3, "has_trained_base": False, "new_blocks": [{"index": 3, "source": 1}]},
            {
                "depth_before": 4,
                "has_trained_base": False,
                "new_blocks": [{"index": 1, "source": 0}, {"index": 4, "source": 2}],
            },
        ],
    }
    assert read_expansion(store, second).to_bytes() == store.read_file(second, EXPANSION_FILE)


@given(st.lists(st.sampled_from([-0.5, 0.0, 0.1, 2.0]), min_size=1, max_size=12), st.data())
def test_importance_copies_the_blocks_that_matter_least(gains: list[float], data: st.DataObject) -> None:
    blocks = data.draw(st.integers(1, len(gains)))
    made = plan(llama(len(gains)), Expand(blocks=blocks, positions="importance"), gains)
    copied = [b.source for b in made.new_blocks]
    assert len(copied) == blocks
    for block in set(range(len(gains))) - set(copied):  # every other one matters more, or as much and stands higher
        assert all((gains[block], block) > (gains[c], c) for c in copied)


@pytest.mark.parametrize(
    ("gains", "complaint"),
    [
        (None, "no importance was measured"),
        ([0.1], "1 gains, a finite number for each of 2 blocks"),
        ([0.1, float("nan")], "a finite number for each of 2 blocks"),
        ([0.1, 0.2], r"expand\.blocks: 3 in a model of 2 blocks; 1 to 2 can be importance"),
    ],
)
def test_importance_that_is_none_of_the_model_is_refused(gains: list[float] | None, complaint: str) -> None:
    with pytest.raises(BadInput, match=complaint):
        plan(llama(2), Expand(blocks=3 if gains == [0.1, 0.2] else 1, positions="importance"), gains)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_hidden_layers": 4}, "missing from the checkpoint"),
        ({"num_hidden_layers": 2}, "not a tensor of a llama model"),
        ({"attention_bias": True}, "missing from the checkpoint"),
        ({"tie_word_embeddings": False}, "lm_head.weight.* is missing"),
        ({"layer_types": ["a"]}, "layer_types"),
        ({"hidden_size": 32}, "has the shape"),
        ({"num_key_value_heads": 2}, r"'model.layers.0.self_attn.k_proj.weight' .and 5 more. has the shape .16, 16."),
        ({"dtype": "bfloat16"}, r"F16, but config.json's dtype is bfloat16"),
        ({"dtype": "int8"}, "one of float64, float32, float16, bfloat16 is expected"),
        ({"quantization_config": {}}, "unquantized"),
    ],
)
def test_a_base_unlike_its_config_is_refused(
    store: Store, make_checkpoint: MakeCheckpoint, options: dict[str, Any], complaint: str
) -> None:
    tree = make_checkpoint(depth=3, tie_word_embeddings=True)
    config = json.loads((tree / "config.json").read_text())
    (tree / "config.json").write_text(json.dumps({**config, **options}))
    base = store.snapshot(tree)
    before = store.snapshots()
    with pytest.raises(BadInput, match=complaint):
        expand(store, base, 1)
    assert store.snapshots() == before


def test_a_record_of_another_depth_is_refused(store: Store, make_checkpoint: MakeCheckpoint) -> None:
    tree = make_checkpoint(depth=3)
    other = store.snapshot(make_checkpoint(depth=2))
    (tree / EXPANSION_FILE).write_bytes(store.read_file(expand(store, other, 2), EXPANSION_FILE))
    with pytest.raises(BadInput, match="tells of 4 blocks"):
        expand(store, store.snapshot(tree), 1)


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ('{"format":2}', "reads format 1"),
        ('{"format":1}', "remove it"),
        ('{"format":1,"depth":3,"storeys":[]}', "no storeys"),
        ('{"format":1,"depth":3,"storeys":[{"depth_before":2,"new_blocks":[{"index":3,"source":0}]}]}', "remove it"),
        ('{"format":1,"depth":3,"storeys":[{"depth_before":2,"new_blocks":[{"index":"a","source":0}]}]}', "remove it"),
        ('{"format":1,"depth":3,"storeys":7}', "remove it"),
        ("[", "not JSON"),
    ],
)
def test_a_record_that_no_expansion_wrote_is_refused(
    store: Store, make_checkpoint: MakeCheckpoint, record: str, complaint: str
) -> None:
    tree = make_checkpoint(depth=3)
    (tree / EXPANSION_FILE).write_text(record)
    with pytest.raises(BadInput, match=complaint):
        expand(store, store.snapshot(tree), 1)


def test_the_stage_makes_what_the_plan_says(
    store: Store, make_checkpoint: MakeCheckpoint, make_context: Callable[..., Any]
) -> None:
    from mansard.models import expand_stage

    base = store.snapshot(make_checkpoint(depth=3))
    context = make_context({"model": base}, {"blocks": 2, "positions": [0, 1]})
    assert expand_stage.run(context) == expand(store, base, 2, [0, 1])
