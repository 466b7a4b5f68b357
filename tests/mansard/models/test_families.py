from typing import Any

import pytest

from mansard.errors import BadInput
from mansard.models.checkpoint import check_once, check_tensors
from mansard.models.config_keys import INERT_KEYS, check_config_keys, unknown_keys
from mansard.models.families import FAMILIES, LLAMA, depth_of, family_of
from mansard.models.rebuilding import rebuilt_config
from mansard.store.safetensors_header import TensorEntry

SHAPE = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_hidden_layers": 3, "vocab_size": 16}
LLAMA_CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SHAPE}


def entries_of(config: dict[str, Any]) -> dict[str, TensorEntry]:
    """What a checkpoint of this config holds."""
    outer = LLAMA.outer_shapes(config)
    shapes = {n: outer[n] for n in LLAMA.outer_tensors(config)}
    for block in range(depth_of(config)):
        shapes |= {LLAMA.block_tensor(block, n): s for n, s in LLAMA.block_shapes(config, block).items()}
    return {n: TensorEntry(n, "BF16", s, 0, 0) for n, s in shapes.items()}


def entry(name: str, dtype: str = "BF16", shape: tuple[int, ...] = (8,)) -> TensorEntry:
    return TensorEntry(name, dtype, shape, 0, 0)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]},
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
        check_tensors(LLAMA, {**LLAMA_CONFIG, flag: "yes"}, {})


@pytest.mark.parametrize("attention_bias", [False, True])
@pytest.mark.parametrize("mlp_bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_names_follow_the_config(attention_bias: bool, mlp_bias: bool, tied: bool) -> None:
    config = {**LLAMA_CONFIG, "attention_bias": attention_bias, "mlp_bias": mlp_bias, "tie_word_embeddings": tied}
    names = entries_of(config)
    assert len(names) == 3 - tied + 3 * (9 + 4 * attention_bias + 3 * mlp_bias)
    silent = [n for n in LLAMA.block_tensors(config, 0) if LLAMA.silent_value(n) is not None]
    assert len(silent) == 2 + attention_bias + mlp_bias
    check_tensors(LLAMA, config, names)
    old = "model.layers.2.self_attn.rotary_emb.inv_freq"
    check_tensors(LLAMA, config, {**names, old: entry(old, "F32", (2,))})
    if tied:
        check_tensors(LLAMA, config, {**names, "lm_head.weight": entry("lm_head.weight", shape=(16, 8))})


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
    names = {n: e for n, e in entries_of(LLAMA_CONFIG).items() if n != removed}
    if added:
        names[added] = entry(added)
    with pytest.raises(BadInput, match=complaint):
        check_tensors(LLAMA, LLAMA_CONFIG, names)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (entry("model.norm.weight", shape=(9,)), r"'model.norm.weight' has the shape \[9\], but .* implies \[8\]"),
        (entry("lm_head.weight", shape=(8, 16)), r"has the shape \[8, 16\], but config.json implies \[16, 8\]"),
        (entry("model.norm.weight", "F32"), "'model.norm.weight' is F32, but tensor 'lm_head.weight' is BF16"),
        (entry("lm_head.weight", "I8", (16, 8)), "'lm_head.weight' is I8; one of F64"),
    ],
)
def test_a_tensor_of_another_shape_or_type_is_refused(wrong: TensorEntry, complaint: str) -> None:
    with pytest.raises(BadInput, match=complaint) as caught:
        check_tensors(LLAMA, LLAMA_CONFIG, {**entries_of(LLAMA_CONFIG), wrong.name: wrong})
    assert "\n" not in str(caught.value)


def test_a_type_unlike_the_config_is_refused() -> None:
    with pytest.raises(BadInput, match=r"BF16, but config.json's dtype is float16"):
        check_tensors(LLAMA, {**LLAMA_CONFIG, "torch_dtype": "float16"}, entries_of(LLAMA_CONFIG))


def test_a_tensor_in_two_files_is_refused() -> None:
    with pytest.raises(BadInput, match="'b' is in both one and two"):
        check_once({"one": [entry("a"), entry("b")], "two": [entry("b")]})


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


def config_of(model_type: str, **entries: Any) -> dict[str, Any]:
    return {"model_type": model_type, "architectures": [FAMILIES[model_type].architecture], **SHAPE, **entries}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(model_type: str) -> None:
    check_config_keys(config_of(model_type))
    with pytest.raises(BadInput, match=r"unknown keys for .* \('hiden_size', did you mean 'hidden_size'\?\)"):
        check_config_keys(config_of(model_type, hiden_size=8))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_all_unknown_keys_are_named_at_once_nested_ones_too(model_type: str) -> None:
    entries = {"mystery": 1, "rope_scaling": {"rope_type": "linear", "facter": 2.0}, "another": [1, 2]}
    entries["rope_parameters"] = {"full_attention": {"rope_theta": 1e4, "bias": 1}}
    config = config_of(model_type, **entries)
    names = ["another", "mystery", "rope_parameters.full_attention.bias", "rope_scaling.facter"]
    assert unknown_keys(config) == names
    with pytest.raises(BadInput, match=r"'rope_scaling\.facter', did you mean 'rope_scaling\.factor'\?") as refused:
        check_config_keys(config)
    assert all(repr(name) in str(refused.value) for name in names) and "\n" not in str(refused.value)
    with pytest.raises(BadInput, match=r"unknown keys for \w+ \('mystery'\)"):
        check_config_keys(config, [n for n in names if n != "mystery"])
    check_config_keys(config, names)


def test_an_ignored_key_that_is_not_there_is_refused() -> None:
    with pytest.raises(BadInput, match=r"ignore_config_keys: config\.json has no such keys \(mistery\)"):
        check_config_keys(config_of("llama", mystery=1), ["mystery", "mistery"])
    check_config_keys(config_of("llama"), ["hidden_size"])


OFFICIAL = {
    "smollm2": ("llama", {"is_llama_config": True, "rope_interleaved": False, "rope_scaling": None,
                          "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}}),
    "falcon3": ("llama", {"activation": "swiglu", "head_dim": 64, "rope_scaling": None}),
    "unsloth": ("llama", {"unsloth_fixed": True, "unsloth_version": "2025.1.5"}),
    "gguf-converted": ("llama", {"_model_name_or_path": "Some Model", "unk_token_id": 0}),
    "llama3.1": ("llama", {"rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                           "original_max_position_embeddings": 8192, "rope_type": "llama3"}}),
    "qwen3-coder": ("qwen3_moe", {"qkv_bias": False, "shared_expert_intermediate_size": 0, "use_qk_norm": True}),
    "phi3.5": ("phi3", {"rope_scaling": {"long_factor": [1.0], "short_factor": [1.0], "type": "longrope"}}),
    "gemma3": ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_theta": 1e6, "rope_type": "default"},
                               "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}}}),
}  # fmt: skip


@pytest.mark.parametrize("name", OFFICIAL)
def test_keys_of_official_configs_that_change_nothing_are_accepted(name: str) -> None:
    model_type, entries = OFFICIAL[name]
    check_config_keys(config_of(model_type, **entries))


@pytest.mark.parametrize(
    ("model_type", "entries"),
    [
        ("llama", {"rope_interleaved": True}),
        ("llama", {"activation": "gelu"}),
        ("llama", {"qkv_bias": False}),
        ("llama", {"use_qk_norm": True}),
        ("qwen3_moe", {"qkv_bias": True}),
        ("qwen3_moe", {"shared_expert_intermediate_size": 512}),
        ("qwen3_moe", {"shared_expert_intermediate_size": False}),
        ("llama", {"gradient_checkpointing": True}),
        ("llama", {"is_causal": False}),
        ("llama", {"bias": True}),
    ],
)
def test_a_key_that_changes_something_in_this_family_or_with_this_value_is_refused(
    model_type: str, entries: dict[str, Any]
) -> None:
    with pytest.raises(BadInput, match=f"unknown keys for {model_type} .*{next(iter(entries))}"):
        check_config_keys(config_of(model_type, **entries))


def test_every_inert_key_says_why() -> None:
    assert all(inert.reason and set(inert.model_types) <= FAMILIES.keys() for inert in INERT_KEYS.values())


@pytest.mark.parametrize(
    ("model_type", "entries", "complaint"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}, "1 of 3 blocks"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "2 of 3 blocks"),
        ("qwen2", {"layer_types": ["full_attention"] * 2 + ["sliding_attention"], "max_window_layers": 3}, "1 of 3"),
        ("qwen2", {"layer_types": ["full_attention"] * 2}, "a list of 3 values"),
        ("qwen2", {"layer_types": ["full_attention"] * 2 + ["linear"]}, "each of full_attention, sliding_attention"),
        ("phi3", {"mlp_bias": True}, "mlp_bias"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_a_config_that_cannot_be_served_is_refused(model_type: str, entries: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BadInput, match=complaint):
        family_of(config_of(model_type, **entries))


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("model_type", "entries", "expected"),
    [
        ("qwen2", {"max_window_layers": 3}, {"layer_types": [FULL] * 5, "max_window_layers": 5}),
        ("qwen2", {"max_window_layers": 21}, {"layer_types": [FULL] * 5, "max_window_layers": 21}),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
            {"layer_types": [SLIDING] * 5, "max_window_layers": 0},
        ),
        ("gemma2", {}, {"layer_types": [SLIDING, FULL, FULL, SLIDING, SLIDING]}),
        ("gemma3_text", {"sliding_window_pattern": 3}, {"layer_types": [SLIDING] * 3 + [FULL] * 2}),
        (
            "gemma3_text",
            {"layer_types": [FULL, SLIDING, FULL]},
            {"layer_types": [FULL, SLIDING, SLIDING, FULL, FULL]},
        ),
        ("qwen3_moe", {"decoder_sparse_step": 2}, {"decoder_sparse_step": 1, "mlp_only_layers": [0, 3, 4]}),
        ("qwen3_moe", {"mlp_only_layers": [1]}, {"decoder_sparse_step": 1, "mlp_only_layers": [1, 2]}),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}, {"decoder_sparse_step": 1, "mlp_only_layers": [0, 1, 2, 3, 4]}),
        ("mixtral", {"sliding_window": 4}, {"sliding_window": 4}),
    ],
)
def test_what_a_family_says_by_index_follows_the_blocks(
    model_type: str, entries: dict[str, Any], expected: dict[str, Any]
) -> None:
    config = config_of(model_type, **entries)
    rebuilt = rebuilt_config(FAMILIES[model_type], config, (0, 1, 1, 2, 2))
    assert rebuilt == {**config, "num_hidden_layers": 5, **expected}


@pytest.mark.parametrize("listed", [[3], [-1], ["0"], 1])
def test_dense_layers_outside_the_model_are_refused(listed: object) -> None:
    with pytest.raises(BadInput, match="mlp_only_layers"):
        rebuilt_config(FAMILIES["qwen3_moe"], config_of("qwen3_moe", mlp_only_layers=listed), (0, 1, 2))


def test_every_expert_is_silenced_and_held_in_a_stack() -> None:
    for model_type, module in (("mixtral", "block_sparse_moe"), ("qwen3_moe", "mlp")):
        family = FAMILIES[model_type]
        names = family.block_tensors(config_of(model_type, num_local_experts=3, num_key_value_heads=1), 0)
        down = "w2" if model_type == "mixtral" else "down_proj"
        silent = [n for n in names if family.silent_value(n) == 0.0]
        assert silent == ["self_attn.o_proj.weight", *(f"{module}.experts.{e}.{down}.weight" for e in range(3))]
        slots = {family.slot(family.block_tensor(1, n)) for n in names if ".experts." in n}
        assert len(slots) == 9
        assert {s.parameter for s in slots} == {
            "model.layers.1.mlp.experts.gate_up_proj",
            "model.layers.1.mlp.experts.down_proj",
        }
