"""Phi-3: q, k and v in one matrix, gate and up in another; one sliding window for all blocks."""

from mansard.errors import BadInput
from mansard.models.families.decoder import attention_widths, norms, outer
from mansard.models.families.family import Config, Family, Shapes, count, flag, zeros_at


def _block(config: Config, block: int) -> Shapes:
    hidden, inner = count(config, "hidden_size"), count(config, "intermediate_size")
    query, key = attention_widths(config)
    return {
        "self_attn.qkv_proj.weight": (query + 2 * key, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "mlp.gate_up_proj.weight": (2 * inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        **norms(config, "input_layernorm", "post_attention_layernorm"),
    }


_BIASES = frozenset({"attention_bias", "lm_head_bias", "mlp_bias"})


def _check_biases(config: Config) -> None:
    """BadInput where biases are asked for, which published configs name to say that there are none."""
    for name in sorted(_BIASES):
        if flag(config, name):
            raise BadInput(f"config.json: {name}: true; transformers' Phi-3 has no biases: false is expected")


PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    block_shapes=_block,
    outer_shapes=outer,
    silent_value=zeros_at("self_attn.o_proj", "mlp.down_proj"),
    config_keys=frozenset(
        {
            "embd_pdrop", "full_attn_mod", "hidden_act", "interpolate_factor", "original_max_position_embeddings",
            "partial_rotary_factor", "resid_pdrop", "sliding_window",
        }
    )
    | _BIASES,
    check_config=_check_biases,
)  # fmt: skip
