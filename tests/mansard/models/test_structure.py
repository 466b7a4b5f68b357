"""The structural proof: what an expansion is, whatever the family, the shards, ties and biases; and what is none.

Checkpoints of every family are made of shapes alone, so nothing loads torch.
"""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mansard.errors import BadInput, Corrupt, StageFailed
from mansard.models.expand import apply, plan
from mansard.models.families import FAMILIES, depth_of
from mansard.models.fuse import TRAINED_FILE, fuse
from mansard.models.model_files import model_config, weight_files
from mansard.models.remove_storey import remove_storey
from mansard.models.storeys import EXPANSION_FILE, Expansion, NewBlock, Storey, newest_tensors, read_expansion
from mansard.models.structure import Structure, held_tensors, prove_structure
from mansard.specs.surgery import Expand
from mansard.store.snapshot import Blob, Manifest, TensorFile, check_model_tree
from mansard.store.store import Store

DEPTH = 3
SHAPE = {
    "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
    "vocab_size": 16, "num_hidden_layers": DEPTH, "dtype": "float16", "num_local_experts": 2,
    "moe_intermediate_size": 4,
}  # fmt: skip
LISTS = {
    "llama": {"layer_types": ["a", "b", "c"], "no_rope_layers": [1, 1, 0], "eos_token_id": [1, 2, 3]},
    "phi3": {"rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1, 1.2], "long_factor": [4.0, 4.1, 4.2]},
             "original_max_position_embeddings": 64, "eos_token_id": [1, 2, 3]},
    "gemma3_text": {"sliding_window_pattern": 3},
    "qwen3_moe": {"decoder_sparse_step": 2},
}  # fmt: skip


def write(folder: Path, model_type: str, shards: int, **more: Any) -> Path:
    """A checkpoint of random numbers in so many files; tensors of one block stand in several of them."""
    family = FAMILIES[model_type]
    known = {k: v for k, v in SHAPE.items() if k in family.config_keys or k not in ("head_dim", "num_local_experts",
             "moe_intermediate_size")}  # fmt: skip
    lists = LISTS.get(model_type, {})
    config = {"model_type": model_type, "architectures": [family.architecture], **known, **lists, **more}
    shapes = {n: s for n, s in family.outer_shapes(config).items() if n in family.outer_tensors(config)}
    for block in range(DEPTH):
        inside = family.block_shapes(config, block)
        shapes |= {family.block_tensor(block, name): shape for name, shape in inside.items()}
    random = numpy.random.default_rng(0)
    tensors = {n: random.standard_normal(s).astype(numpy.float16) for n, s in shapes.items()}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    files = {f"model-{i}.safetensors": names[i::shards] for i in range(shards)}
    if shards == 1:
        files = {"model.safetensors": names}
    else:
        index = {"metadata": {}, "weight_map": {n: f for f, inside in files.items() for n in inside}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, inside in files.items():
        save_file({n: tensors[n] for n in inside}, folder / file, metadata={"format": "pt"})
    return folder


def expand(store: Store, base: str, *positions: int) -> str:
    return apply(store, base, plan(model_config(store, base), Expand(blocks=len(positions), positions=list(positions))))


def prove(store: Store, base: str, expansion: str) -> Structure:
    return prove_structure(store, base, expansion, lambda done, total: None)


def trained(store: Store, expansion: str, folder: Path) -> str:
    """The expansion fused with random tensors in its newest storey."""
    random, held = numpy.random.default_rng(1), held_tensors(store, expansion)
    shapes = {name: held[name].entry.shape for name in newest_tensors(store, expansion)}
    made = {name: random.standard_normal(shape).astype(numpy.float16) for name, shape in shapes.items()}
    folder.mkdir()
    save_file(made, folder / TRAINED_FILE)
    return fuse(store, expansion, store.snapshot(folder))


def biases_of(model_type: str) -> st.SearchStrategy[dict[str, bool]]:
    keys = {"llama": ["attention_bias", "mlp_bias"], "qwen3": ["attention_bias"], "qwen3_moe": ["attention_bias"],
            "gemma2": ["attention_bias"], "gemma3_text": ["attention_bias"]}.get(model_type, [])  # fmt: skip
    return st.fixed_dictionaries({key: st.booleans() for key in keys})


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data(), model_type=st.sampled_from(sorted(FAMILIES)), shards=st.integers(1, 4), tied=st.booleans())
def test_storeys_of_any_family_are_proved_stacked_trained_and_taken_away(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, model_type: str, shards: int, tied: bool
) -> None:
    folder = tmp_path_factory.mktemp("case")
    store = Store(folder / "store")
    tree = write(folder / "base", model_type, shards, tie_word_embeddings=tied, **data.draw(biases_of(model_type)))
    base = store.snapshot(tree)
    first_at = data.draw(st.lists(st.integers(0, DEPTH - 1), min_size=1, max_size=DEPTH, unique=True))
    first = expand(store, base, *first_at)
    found = prove(store, base, first)
    assert found.kept == len(held_tensors(store, base))
    assert found.copied > 0 and found.silent >= 2 * len(first_at)
    fused = trained(store, first, folder / "first")
    depth = depth_of(model_config(store, fused))
    second = expand(store, fused, *data.draw(st.lists(st.integers(0, depth - 1), min_size=1, max_size=2, unique=True)))
    prove(store, fused, second)
    check_model_tree(store.materialize(second))
    whole = trained(store, second, folder / "second")
    assert remove_storey(store, whole, 2) == fused
    back = remove_storey(store, fused, 1)
    digests = {n: h.digest for n, h in held_tensors(store, base).items()}
    assert {n: h.digest for n, h in held_tensors(store, back).items()} == digests
    assert {k: v for k, v in model_config(store, back).items() if k in model_config(store, base)} | {
        k: v for k, v in model_config(store, base).items() if k in ("decoder_sparse_step",)
    } == model_config(store, base)


def changed(store: Store, model: str, name: str, digest: str) -> str:
    """The model with another object in one tensor."""
    files = dict(store.manifest(model).files)
    for path, file in weight_files(store.manifest(model)).items():
        if name in file.tensors:
            files[path] = TensorFile(file.header, {**file.tensors, name: digest}, file.size_bytes)
    return store.put_manifest(Manifest(files))


@pytest.fixture
def base(store: Store, tmp_path: Path) -> str:
    return store.snapshot(write(tmp_path / "base", "llama", 2, attention_bias=True))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.2.self_attn.o_proj.weight", "is not 0 throughout"),
        ("model.layers.2.self_attn.o_proj.bias", "is not 0 throughout"),
        ("model.layers.2.mlp.up_proj.weight", "is not its base's"),
        ("model.layers.3.mlp.down_proj.weight", "is not its base's"),
        ("model.embed_tokens.weight", "is not its base's"),
    ],
)
def test_one_tensor_that_differs_fails_the_proof_by_name(store: Store, base: str, name: str, words: str) -> None:
    expansion = expand(store, base, 1)
    size_bytes = held_tensors(store, expansion)[name].entry.size_bytes
    other = store.put_bytes(bytes(size_bytes - 2) + b"\x00\x3c")
    with pytest.raises(StageFailed, match=rf"tensor '{name}' {words}") as failed:
        prove(store, base, changed(store, expansion, name, other))
    assert "\n" not in str(failed.value)


def test_a_config_that_says_something_else_fails_the_proof(store: Store, base: str) -> None:
    expansion = expand(store, base, 1)
    files = dict(store.manifest(expansion).files)
    config = json.dumps({**model_config(store, expansion), "rms_norm_eps": 0.1}).encode()
    files["config.json"] = Blob(store.put_bytes(config), len(config))
    with pytest.raises(StageFailed, match=r"config\.json is not its base's"):
        prove(store, base, store.put_manifest(Manifest(files)))


def test_an_expansion_of_another_base_fails_the_proof(store: Store, base: str, tmp_path: Path) -> None:
    other = store.snapshot(write(tmp_path / "other", "llama", 2, attention_bias=True, rms_norm_eps=0.1))
    with pytest.raises(StageFailed, match=r"config\.json is not its base's"):
        prove(store, other, expand(store, base, 1))
    with pytest.raises(StageFailed, match="stands on 3 blocks, its base has 4"):
        prove(store, expand(store, base, 0), expand(store, base, 1))


def test_a_record_that_names_other_places_fails_the_proof(store: Store, base: str) -> None:
    expansion = expand(store, base, 1)
    record = Expansion(4, (Storey(3, (NewBlock(3, 2),)),)).to_bytes()
    files = {**store.manifest(expansion).files, EXPANSION_FILE: Blob(store.put_bytes(record), len(record))}
    assert read_expansion(store, expansion).new_blocks == (NewBlock(2, 1),)
    with pytest.raises(StageFailed, match=r"config.json is not|is not its base's|is not 0"):
        prove(store, base, store.put_manifest(Manifest(files)))


@pytest.mark.parametrize("number", [b"\x00\x7c", b"\x00\xfc", b"\x01\x7c"], ids=["infinity", "minus", "nan"])
def test_a_base_that_is_not_finite_is_refused(store: Store, base: str, number: bytes) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    size_bytes = held_tensors(store, base)[name].entry.size_bytes
    broken = changed(store, base, name, store.put_bytes(bytes(size_bytes - 2) + number))
    with pytest.raises(BadInput, match=f"the base's tensor '{name}' holds NaN or infinity"):
        prove(store, broken, expand(store, broken, 2))


def test_a_flipped_bit_in_the_store_is_found(store: Store, base: str) -> None:
    expansion = expand(store, base, 1)
    path = store.root / "objects"
    digest = held_tensors(store, base)["model.layers.0.mlp.up_proj.weight"].digest
    file = path / digest[:2] / digest
    file.chmod(0o644)
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    with pytest.raises(Corrupt, match=r"model.layers.0.mlp.up_proj.weight"):
        prove(store, base, expansion)
