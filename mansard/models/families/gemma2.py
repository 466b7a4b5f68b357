"""Gemma-2: norms before and after attention and MLP, scale 1 + weight; every other block has a sliding window.

A post-norm blows a tiny output up to full size, so zeroed projections would leave a model that one step throws out of
place (18 to 113 % of the logits). The two post-norm weights at -1 silence the block instead: under 0.1 % (facts.md).
"""

from collections.abc import Sequence
from typing import Any

from mansard.errors import BadInput
from mansard.models.families.decoder import attention, attention_widths, layer_types, mlp, norms, outer
from mansard.models.families.family import Config, Family, Shapes, depth_of, flag

GEMMA_KEYS = frozenset(
    {
        "attention_bias", "attn_logit_softcapping", "cache_implementation", "final_logit_softcapping", "head_dim",
        "hidden_act", "hidden_activation", "layer_types", "query_pre_attn_scalar", "sliding_window",
        "use_bidirectional_attention",
    }
)  # fmt: skip

_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def silent_post_norms(name: str) -> float | None:
    """-1 for the two norms whose output is added to the residual stream."""
    return -1.0 if name in ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight") else None


def gemma_block(config: Config, block: int) -> Shapes:
    biased = ("q_proj", "k_proj", "v_proj", "o_proj") if flag(config, "attention_bias") else ()
    widths = attention_widths(config, head_dim=256, key_heads=4)
    return {**attention(config, widths, biased), **mlp(config), **norms(config, *_NORMS)}


def check_causal(config: Config) -> None:
    """BadInput for an encoder."""
    if config.get("use_bidirectional_attention"):
        raise BadInput("config.json: use_bidirectional_attention: true is an encoder; false, a decoder, is expected")


def _rebuilt(config: Config, sources: Sequence[int]) -> dict[str, Any]:
    inferred = ["full_attention" if block % 2 else "sliding_attention" for block in range(depth_of(config))]
    kinds = layer_types(config, inferred)
    return {"layer_types": [kinds[source] for source in sources]}


GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    block_shapes=gemma_block,
    outer_shapes=outer,
    silent_value=silent_post_norms,
    config_keys=GEMMA_KEYS,
    ties_embeddings=True,
    per_block_lists=("layer_types",),
    rebuilt_entries=_rebuilt,
    check_config=check_causal,
)
