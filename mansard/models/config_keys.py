"""The keys of config.json: those that decide what a model computes are known, those that change nothing are listed with
the reason, any other is refused. All of them are named at once.

Checked where a base comes in (spec, folder, stage `check`, `mansard.expand`), once: what is in the store was accepted.
Nested mappings of rotary settings follow the same rule under dotted names (`rope_scaling.factor`). Looked up in
transformers 5.17 and vLLM 0.32: what either reads of a model of these families is not in the list.
"""

import difflib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mansard.errors import BadInput
from mansard.models.families import Config, Family, family_of

SHAPE_KEYS = frozenset(
    {
        "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
        "num_key_value_heads", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings",
        "vocab_size",
    }
)  # fmt: skip

TRANSFORMERS_KEYS = frozenset(
    {
        "_attn_implementation", "_name_or_path", "add_cross_attention", "architectures", "attention_dropout",
        "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
        "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype",
        "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty",
        "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label", "initializer_range", "is_decoder",
        "is_encoder_decoder", "label2id", "length_penalty", "max_length", "min_length", "model_type",
        "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
        "output_hidden_states", "output_scores", "pad_token_id", "prefix", "problem_type", "pruned_heads",
        "quantization_config", "remove_invalid_values", "repetition_penalty", "return_dict",
        "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature",
        "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
        "transformers_version", "typical_p", "use_bfloat16", "use_cache",
    }
)  # fmt: skip
"""What transformers 4 and 5 write into every config.json, whatever the architecture."""


@dataclass(frozen=True, slots=True)
class InertKey:
    """A key that changes nothing: why, with which values (none named: any), and in which families (none named: all)."""

    reason: str
    values: tuple[Any, ...] = ()
    model_types: tuple[str, ...] = ()

    def covers(self, model_type: str, value: object) -> bool:
        is_inert_value = not self.values or any(type(value) is type(v) and value == v for v in self.values)
        return is_inert_value and (not self.model_types or model_type in self.model_types)


INERT_KEYS: Mapping[str, InertKey] = {
    "_attn_implementation_autoset": InertKey("transformers 4.48's note to itself on the choice of a kernel"),
    "_commit_hash": InertKey("where a download came from"),
    "_flash_attn_2_enabled": InertKey("an early transformers' choice of a kernel"),
    "_model_name_or_path": InertKey("a name that conversion from GGUF writes"),
    "activation": InertKey("Falcon3's name of its gated MLP; hidden_act is what is read", ("swiglu",)),
    "attn_implementation": InertKey("a choice of a kernel; Mansard and vLLM choose their own"),
    "classifier_dropout": InertKey("of sequence classifiers, which are other architectures"),
    "cls_token_id": InertKey("the tokenizer's"),
    "gradient_checkpointing": InertKey("how training saves memory", (False,)),
    "is_llama_config": InertKey("SmolLM's mark of its training program's exporter", (True,)),
    "keys_to_ignore_at_inference": InertKey("of transformers' own evaluation loop"),
    "max_new_tokens": InertKey("how long an answer may get, where a request says nothing"),
    "min_new_tokens": InertKey("how long an answer must get, where a request says nothing"),
    "output_past": InertKey("transformers 2's name of use_cache"),
    "qkv_bias": InertKey("Qwen3-Coder says so that q, k and v have none", (False,), ("qwen3_moe",)),
    "rope_interleaved": InertKey("SmolLM's exporter says that rotary pairs are halves, as Llama's are", (False,)),
    "shared_expert_intermediate_size": InertKey("no shared expert, as Qwen3-MoE has none", (0,), ("qwen3_moe",)),
    "transformers.js_config": InertKey("for the JavaScript library"),
    "unk_token_id": InertKey("the tokenizer's"),
    "unsloth_fixed": InertKey("a mark of unsloth's uploads"),
    "unsloth_version": InertKey("which unsloth saved the model"),
    "use_qk_norm": InertKey("what Qwen3's attention does anyway", (True,), ("qwen3", "qwen3_moe")),
    "use_return_dict": InertKey("how transformers hands over what was computed"),
}

ROTARY_KEYS = frozenset(
    {
        "attention_factor", "beta_fast", "beta_slow", "factor", "high_freq_factor", "long_factor", "long_mscale",
        "low_freq_factor", "mscale", "mscale_all_dim", "original_max_position_embeddings", "partial_rotary_factor",
        "rope_theta", "rope_type", "short_factor", "short_mscale", "truncate", "type",
    }
)  # fmt: skip
"""What `rope_parameters` and `rope_scaling` may hold; Gemma-3 keeps such a mapping for each kind of attention."""
ROTARY_MAPPINGS = ("rope_parameters", "rope_scaling")
ATTENTION_KINDS = ("full_attention", "sliding_attention")


def check_config_keys(config: Config, ignored: Collection[str] = ()) -> None:
    """BadInput that names every key that nobody here knows, but for `ignored`: it may change what the model computes,
    or hold one value per block. Also where `ignored` names what is not in config.json."""
    family = family_of(config)
    if absent := [name for name in ignored if not _holds(config, name)]:
        raise BadInput(f"ignore_config_keys: config.json has no such keys ({', '.join(absent)}); remove them")
    unknown = [name for name in unknown_keys(config) if name not in ignored]
    if unknown:
        listed = ", ".join(_described(name, family, config) for name in unknown)
        raise BadInput(
            f"config.json: unknown keys for {family.model_type} ({listed}); correct or remove them, or name those that "
            "change nothing the model computes in ignore_config_keys, under base"
        )


def unknown_keys(config: Config) -> list[str]:
    """The keys, sorted, that neither decide anything known nor are listed as inert; nested ones by dotted names."""
    family = family_of(config)
    known = _known_keys(family)
    top = [k for k, v in config.items() if k not in known and not _is_inert(k, family.model_type, v)]
    return sorted([*top, *_unknown_rotary_keys(config)])


def _known_keys(family: Family) -> frozenset[str]:
    return SHAPE_KEYS | TRANSFORMERS_KEYS | family.config_keys | set(family.per_block_lists)


def _is_inert(key: str, model_type: str, value: object) -> bool:
    inert = INERT_KEYS.get(key)
    return inert is not None and inert.covers(model_type, value)


def _unknown_rotary_keys(config: Config) -> Iterator[str]:
    for name in ROTARY_MAPPINGS:
        settings = config.get(name)
        if not isinstance(settings, Mapping):
            continue
        for key, value in settings.items():
            if key in ATTENTION_KINDS and isinstance(value, Mapping):
                yield from (f"{name}.{key}.{inner}" for inner in value if inner not in ROTARY_KEYS)
            elif key not in ROTARY_KEYS:
                yield f"{name}.{key}"


def _described(name: str, family: Family, config: Config) -> str:
    """The key with its value where another one would be inert, or with the known key that is nearest."""
    inert = INERT_KEYS.get(name)
    if inert is not None and inert.values and (not inert.model_types or family.model_type in inert.model_types):
        return f"{name!r}: only {json.dumps(inert.values[0])} is known to change nothing"
    prefix, dot, last = name.rpartition(".")
    is_nested = dot != "" and name not in config
    known = ROTARY_KEYS if is_nested else _known_keys(family)
    near = difflib.get_close_matches(last if is_nested else name, sorted(known), n=1)
    return f"{name!r}, did you mean {prefix + dot + near[0] if is_nested else near[0]!r}?" if near else f"{name!r}"


def _holds(config: Config, name: str) -> bool:
    return name in config or name in set(_unknown_rotary_keys(config))
