"""Qwen3: norms on each head's queries and keys, heads of 128 unless said otherwise, windows as Qwen2 has them."""

from mansard.models.families.decoder import (
    attention,
    attention_widths,
    head_norms,
    head_width,
    mlp,
    norms,
    outer,
)
from mansard.models.families.family import Config, Family, Shapes, flag, zeros_at
from mansard.models.families.qwen2 import WINDOW_KEYS, check_windows, rebuilt_windows


def _block(config: Config, block: int) -> Shapes:
    biased = ("q_proj", "k_proj", "v_proj", "o_proj") if flag(config, "attention_bias") else ()
    return {
        **attention(config, attention_widths(config, head_dim=128, key_heads=32), biased),
        **head_norms(config, head_width(config, 128)),
        **mlp(config),
        **norms(config, "input_layernorm", "post_attention_layernorm"),
    }


QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    block_shapes=_block,
    outer_shapes=outer,
    silent_value=zeros_at("self_attn.o_proj", "mlp.down_proj"),
    config_keys=frozenset({"attention_bias", "head_dim", "hidden_act"}) | WINDOW_KEYS,
    per_block_lists=("layer_types",),
    rebuilt_entries=rebuilt_windows,
    check_config=check_windows,
)
