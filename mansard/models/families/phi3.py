"""Phi-3: q, k and v in one matrix, gate and up in another; one sliding window for all blocks."""

from mansard.models.families.decoder import attention_widths, norms, outer
from mansard.models.families.family import Config, Family, Shapes, count, zeros_at


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


PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    block_shapes=_block,
    outer_shapes=outer,
    silent_value=zeros_at("self_attn.o_proj", "mlp.down_proj"),
    config_keys=frozenset(
        {
            "embd_pdrop", "hidden_act", "original_max_position_embeddings", "partial_rotary_factor", "resid_pdrop",
            "sliding_window",
        }
    ),
)  # fmt: skip
