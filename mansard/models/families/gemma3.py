"""Gemma-3, text models: Gemma-2's block with norms on queries and keys; five blocks with a window, then one without.

The pattern may stand in config.json as a number (`sliding_window_pattern`); the expansion writes the list. Models that
also see images (model_type gemma3) are another architecture and are refused by name.
"""

from collections.abc import Sequence
from typing import Any

from mansard.models.families.decoder import head_norms, head_width, layer_types, outer
from mansard.models.families.family import Config, Family, Shapes, count, depth_of
from mansard.models.families.gemma2 import GEMMA_KEYS, check_causal, gemma_block, silent_post_norms


def _block(config: Config, block: int) -> Shapes:
    return {**gemma_block(config, block), **head_norms(config, head_width(config, 256))}


def _rebuilt(config: Config, sources: Sequence[int]) -> dict[str, Any]:
    pattern = count(config, "sliding_window_pattern", 6)
    inferred = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(depth_of(config))]
    kinds = layer_types(config, inferred)
    return {"layer_types": [kinds[source] for source in sources]}


GEMMA3 = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    block_shapes=_block,
    outer_shapes=outer,
    silent_value=silent_post_norms,
    config_keys=GEMMA_KEYS | {"_sliding_window_pattern", "rope_local_base_freq", "sliding_window_pattern"},
    ties_embeddings=True,
    per_block_lists=("layer_types",),
    rebuilt_entries=_rebuilt,
    check_config=check_causal,
)
