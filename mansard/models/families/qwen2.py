"""Qwen2 and 2.5: biases on q, k and v; blocks from `max_window_layers` on may have a sliding window.

vLLM serves no model in which some blocks have a window and some have none: it asserts `max_window_layers ==
num_hidden_layers` and then gives all blocks the same. Such a base is refused before anything is made of it.
"""

from collections.abc import Sequence
from typing import Any

from mansard.errors import BadInput
from mansard.models.families.decoder import attention, attention_widths, layer_types, mlp, norms, outer
from mansard.models.families.family import Config, Family, Shapes, count, depth_of, flag, zeros_at

WINDOW_KEYS = frozenset({"layer_types", "max_window_layers", "sliding_window", "use_sliding_window"})


def _block(config: Config, block: int) -> Shapes:
    return {
        **attention(config, attention_widths(config, key_heads=32), ("q_proj", "k_proj", "v_proj")),
        **mlp(config),
        **norms(config, "input_layernorm", "post_attention_layernorm"),
    }


def window_types(config: Config) -> list[str]:
    """Each block's kind of attention, as Qwen2Config and Qwen3Config read it."""
    depth, first = depth_of(config), config.get("max_window_layers", 28)
    has_windows = flag(config, "use_sliding_window") and config.get("sliding_window", 4096) is not None
    if has_windows and (type(first) is not int or first < 0):
        raise BadInput(f"config.json: max_window_layers: {first!r:.80}; a number from 0 up is expected")
    inferred = ["sliding_attention" if has_windows and i >= first else "full_attention" for i in range(depth)]
    return layer_types(config, inferred)


def check_windows(config: Config) -> None:
    """BadInput where only some blocks have a window."""
    kinds = window_types(config)
    if len(set(kinds)) > 1:
        raise BadInput(
            f"config.json: {kinds.count('sliding_attention')} of {len(kinds)} blocks have a sliding window "
            f"(max_window_layers {config.get('max_window_layers')!r}): vLLM cannot serve mixed windows of "
            f"{config['model_type']}; max_window_layers == num_hidden_layers must hold"
        )
    if "sliding_attention" in kinds:
        count(config, "sliding_window", 4096)


def rebuilt_windows(config: Config, sources: Sequence[int]) -> dict[str, Any]:
    """layer_types written out, and the number of blocks without a window (which come first)."""
    kinds = window_types(config)
    rebuilt: dict[str, Any] = {"layer_types": [kinds[source] for source in sources]}
    if flag(config, "use_sliding_window") or config.get("max_window_layers") == depth_of(config):
        rebuilt["max_window_layers"] = rebuilt["layer_types"].count("full_attention")
    return rebuilt


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    block_shapes=_block,
    outer_shapes=outer,
    silent_value=zeros_at("self_attn.o_proj", "mlp.down_proj"),
    config_keys=frozenset({"hidden_act", "use_mrope"}) | WINDOW_KEYS,
    per_block_lists=("layer_types",),
    rebuilt_entries=rebuilt_windows,
    check_config=check_windows,
)
