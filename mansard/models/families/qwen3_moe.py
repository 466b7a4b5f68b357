"""Qwen3-MoE: Qwen3's attention; a block has experts unless it is listed in `mlp_only_layers` or between sparse steps.

Both say it by index. Once blocks are inserted the step would count other blocks, so the expansion sets
`decoder_sparse_step` to 1 and lists every dense block under its new index.
"""

from collections.abc import Sequence
from typing import Any

from mansard.errors import BadInput
from mansard.models.families.decoder import attention, attention_widths, head_norms, head_width, mlp, norms, outer
from mansard.models.families.experts import expert_shapes, expert_slot
from mansard.models.families.family import Config, Family, Shapes, Slot, count, depth_of, flag

_MODULE = "mlp.experts"
_NAMES = ("gate_proj", "up_proj", "down_proj")


def is_dense(config: Config, block: int) -> bool:
    """The block has an MLP and no experts."""
    listed = config.get("mlp_only_layers") or []
    depth = depth_of(config)
    if not isinstance(listed, list) or any(type(i) is not int or not 0 <= i < depth for i in listed):
        raise BadInput(f"config.json: mlp_only_layers: {listed!r:.80}; a list of blocks 0 to {depth - 1} is expected")
    return block in listed or (block + 1) % count(config, "decoder_sparse_step", 1) != 0


def _experts(config: Config) -> int:
    return count(config, "num_local_experts" if "num_local_experts" in config else "num_experts", 128)


def _block(config: Config, block: int) -> Shapes:
    hidden, width = count(config, "hidden_size"), head_width(config)
    biased = ("q_proj", "k_proj", "v_proj", "o_proj") if flag(config, "attention_bias") else ()
    shapes = {
        **attention(config, attention_widths(config, key_heads=4), biased),
        **head_norms(config, width),
        **norms(config, "input_layernorm", "post_attention_layernorm"),
    }
    if is_dense(config, block):
        return {**shapes, **mlp(config)}
    experts, inner = _experts(config), count(config, "moe_intermediate_size", 768)
    return {
        **shapes,
        "mlp.gate.weight": (experts, hidden),
        **expert_shapes(_MODULE, _NAMES, experts, hidden, inner),
    }


def _silent(name: str) -> float | None:
    slot = expert_slot(_MODULE, _NAMES, name)
    is_last = name in ("self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.weight")
    return 0.0 if is_last or (slot is not None and slot.parameter.endswith("down_proj")) else None


def _rebuilt(config: Config, sources: Sequence[int]) -> dict[str, Any]:
    dense = [i for i, source in enumerate(sources) if is_dense(config, source)]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    block_shapes=_block,
    outer_shapes=outer,
    silent_value=_silent,
    config_keys=frozenset(
        {
            "attention_bias", "decoder_sparse_step", "head_dim", "hidden_act", "max_window_layers", "mlp_only_layers",
            "moe_intermediate_size", "norm_topk_prob", "num_experts", "num_experts_per_tok", "num_local_experts",
            "output_router_logits", "router_aux_loss_coef", "sliding_window", "use_sliding_window",
        }
    ),
    slot_in_block=lambda name: expert_slot(_MODULE, _NAMES, name) or Slot(name),
    rebuilt_entries=_rebuilt,
)  # fmt: skip
