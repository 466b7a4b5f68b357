"""Mistral: Llama's block without biases; one sliding window for all blocks, so nothing depends on a block's index."""

from mansard.models.families.decoder import attention, attention_widths, mlp, norms, outer
from mansard.models.families.family import Config, Family, Shapes, zeros_at


def _block(config: Config, block: int) -> Shapes:
    return {
        **attention(config, attention_widths(config, key_heads=8)),
        **mlp(config),
        **norms(config, "input_layernorm", "post_attention_layernorm"),
    }


MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    block_shapes=_block,
    outer_shapes=outer,
    silent_value=zeros_at("self_attn.o_proj", "mlp.down_proj"),
    config_keys=frozenset({"head_dim", "hidden_act", "sliding_window"}),
)
