"""Model families: what the surgery must know of an architecture, one file each. Any other is refused by name.

Supported: Llama, Mistral, Qwen2, Qwen3, Gemma-2, Gemma-3 (text), Phi-3, Mixtral, Qwen3-MoE.
"""

import difflib

from mansard.errors import BadInput
from mansard.models.families.family import Config, Family, Slot, depth_of
from mansard.models.families.gemma2 import GEMMA2
from mansard.models.families.gemma3 import GEMMA3
from mansard.models.families.llama import LLAMA
from mansard.models.families.mistral import MISTRAL
from mansard.models.families.mixtral import MIXTRAL
from mansard.models.families.phi3 import PHI3
from mansard.models.families.qwen2 import QWEN2
from mansard.models.families.qwen3 import QWEN3
from mansard.models.families.qwen3_moe import QWEN3_MOE

__all__ = ["FAMILIES", "LLAMA", "Config", "Family", "Slot", "depth_of", "family_of"]

FAMILIES = {
    family.model_type: family
    for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, MIXTRAL, QWEN3_MOE)
}

_SHAPE_KEYS = frozenset(
    {
        "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
        "num_key_value_heads", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings",
        "vocab_size",
    }
)  # fmt: skip

_OTHER_KEYS = frozenset(
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


def family_of(config: Config) -> Family:
    """The family of a config.json; BadInput names what is supported, or the entry that cannot be expanded or served."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None or config.get("architectures") != [family.architecture]:
        known = ", ".join(f"{f.model_type} ({f.architecture})" for f in FAMILIES.values())
        raise BadInput(
            f"config.json: model_type {config.get('model_type')!r} with architectures "
            f"{config.get('architectures')!r} cannot be expanded; supported: {known}"
        )
    if config.get("quantization_config") is not None:
        raise BadInput("config.json: quantization_config: the model is quantized; name the unquantized one as base")
    _check_keys(family, config)
    family.check_config(config)
    return family


def _check_keys(family: Family, config: Config) -> None:
    """An entry that nobody here knows may change what the model computes, or hold one value per block."""
    known = _SHAPE_KEYS | _OTHER_KEYS | family.config_keys | set(family.per_block_lists)
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"did you mean {near[0]!r}? If not, and" if near else "if"
            raise BadInput(
                f"config.json: unknown key {key!r} for {family.model_type}; {hint} it changes nothing, remove it"
            )
