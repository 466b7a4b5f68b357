from typing import Any

import pytest

from mansard.errors import BadInput
from mansard.models.families import LLAMA, check_tensor_names, depth_of, family_of, rebuilt_config

LLAMA_CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 3}


def tensor_names(config: dict[str, Any]) -> set[str]:
    blocks = {LLAMA.block_tensor(b, n) for b in range(depth_of(config)) for n in LLAMA.block_tensors(config)}
    return blocks | set(LLAMA.outer_tensors(config))


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
        {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
        {"model_type": "llama"},
        {"architectures": ["LlamaForCausalLM"]},
        {"model_type": ["llama"], "architectures": "LlamaForCausalLM"},
        {},
    ],
)
def test_another_family_is_refused_by_name_with_the_supported_ones(config: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"supported: llama \(LlamaForCausalLM\)") as caught:
        family_of(config)
    assert str(config.get("model_type")) in str(caught.value)


def test_a_quantized_base_is_refused() -> None:
    with pytest.raises(BadInput, match="unquantized"):
        family_of({**LLAMA_CONFIG, "quantization_config": {"quant_method": "awq"}})


@pytest.mark.parametrize("depth", [0, -1, "3", None, True, 3.0])
def test_a_depth_that_is_no_count_is_refused(depth: object) -> None:
    with pytest.raises(BadInput, match="num_hidden_layers"):
        depth_of({**LLAMA_CONFIG, "num_hidden_layers": depth})


@pytest.mark.parametrize("flag", ["attention_bias", "mlp_bias", "tie_word_embeddings"])
def test_a_flag_that_is_no_flag_is_refused(flag: str) -> None:
    with pytest.raises(BadInput, match=flag):
        check_tensor_names(LLAMA, {**LLAMA_CONFIG, flag: "yes"}, [])


@pytest.mark.parametrize("attention_bias", [False, True])
@pytest.mark.parametrize("mlp_bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_names_follow_the_config(attention_bias: bool, mlp_bias: bool, tied: bool) -> None:
    config = {**LLAMA_CONFIG, "attention_bias": attention_bias, "mlp_bias": mlp_bias, "tie_word_embeddings": tied}
    names = tensor_names(config)
    assert len(names) == 3 - tied + 3 * (9 + 4 * attention_bias + 3 * mlp_bias)
    assert len(LLAMA.zeroed(config)) == 2 + attention_bias + mlp_bias
    check_tensor_names(LLAMA, config, names)
    check_tensor_names(LLAMA, config, names | {"model.layers.2.self_attn.rotary_emb.inv_freq"})
    if tied:
        check_tensor_names(LLAMA, config, names | {"lm_head.weight"})


@pytest.mark.parametrize(
    ("removed", "added", "complaint"),
    [
        ("model.norm.weight", None, "'model.norm.weight' is missing"),
        ("model.layers.2.mlp.up_proj.weight", None, "'model.layers.2.mlp.up_proj.weight' is missing"),
        (None, "model.layers.3.mlp.up_proj.weight", "'model.layers.3.mlp.up_proj.weight' is not a tensor"),
        (None, "model.layers.1.self_attn.q_proj.bias", "'model.layers.1.self_attn.q_proj.bias' is not a tensor"),
        (None, "model.layers.01.mlp.up_proj.weight", "is not a tensor"),
        (None, "model.layers.1.mlp.up_proj.weight_packed", "is not a tensor"),
    ],
)
def test_a_checkpoint_unlike_its_config_is_refused(removed: str | None, added: str | None, complaint: str) -> None:
    names = (tensor_names(LLAMA_CONFIG) - {removed}) | ({added} if added else set())
    with pytest.raises(BadInput, match=complaint):
        check_tensor_names(LLAMA, LLAMA_CONFIG, names)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.12.mlp.up_proj.weight", (12, "mlp.up_proj.weight")),
        ("model.layers.1.x", (1, "x")),
        ("model.layers.01.x", None),
        ("model.layers.²x", None),
        ("model.layers.².x", None),
        ("model.layers.1", None),
        ("model.layersx.1.x", None),
        ("model.norm.weight", None),
        ("1.x", None),
    ],
)
def test_only_exact_names_are_block_tensors(name: str, place: tuple[int, str] | None) -> None:
    assert LLAMA.split(name) == place


def test_every_per_block_entry_follows_the_blocks() -> None:
    config = {
        **LLAMA_CONFIG,
        "layer_types": ["a", "b", "c"],
        "no_rope_layers": [1, 0, 1],
        "pruned_heads": {"1": [0, 2], "2": [1]},
        "mlp_layer_types": None,
        "eos_token_id": [1, 2, 3],
        "rope_scaling": {"factors": [1.0, 2.0, 3.0]},
    }
    rebuilt = rebuilt_config(LLAMA, config, (0, 1, 1, 2, 2))
    assert rebuilt == {
        **config,
        "num_hidden_layers": 5,
        "layer_types": ["a", "b", "b", "c", "c"],
        "no_rope_layers": [1, 0, 0, 1, 1],
        "pruned_heads": {"1": [0, 2], "2": [0, 2], "3": [1], "4": [1]},
    }
    assert list(rebuilt) == list(config)


def test_a_list_that_may_be_per_block_is_not_guessed() -> None:
    with pytest.raises(BadInput, match="window_sizes"):
        rebuilt_config(LLAMA, {**LLAMA_CONFIG, "window_sizes": [1, 2, 3]}, (0, 1, 2))


@pytest.mark.parametrize("value", [["a", "b"], "abc", {"0": "a"}])
def test_a_per_block_entry_of_another_length_is_refused(value: object) -> None:
    with pytest.raises(BadInput, match="layer_types"):
        rebuilt_config(LLAMA, {**LLAMA_CONFIG, "layer_types": value}, (0, 1, 2))
