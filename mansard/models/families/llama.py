"""Llama (1 to 3): attention and MLP may have biases; the last factors before the residual are o_proj and down_proj."""

from mansard.models.families.decoder import attention, attention_widths, mlp, norms, outer
from mansard.models.families.family import Config, Family, Shapes, flag, zeros_at


def _block(config: Config, block: int) -> Shapes:
    biased = ("q_proj", "k_proj", "v_proj", "o_proj") if flag(config, "attention_bias") else ()
    return {
        **attention(config, attention_widths(config), biased),
        **mlp(config, flag(config, "mlp_bias")),
        **norms(config, "input_layernorm", "post_attention_layernorm"),
    }


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    block_shapes=_block,
    outer_shapes=outer,
    silent_value=zeros_at("self_attn.o_proj", "mlp.down_proj"),
    config_keys=frozenset({"attention_bias", "head_dim", "hidden_act", "mlp_bias", "pretraining_tp"}),
    # A constant that early conversions saved (Llama 2 has it); transformers and vLLM skip it.
    optional_block_tensors=("self_attn.rotary_emb.inv_freq",),
    per_block_lists=("layer_types", "mlp_layer_types", "no_rope_layers"),
)
