"""Mixtral: every block has experts, called w1 (gate), w3 (up) and w2 (down) on disk; every expert's w2 becomes zero."""

from mansard.models.families.decoder import attention, attention_widths, norms, outer
from mansard.models.families.experts import expert_shapes, expert_slot
from mansard.models.families.family import Config, Family, Shapes, Slot, count

_MODULE = "block_sparse_moe.experts"
_NAMES = ("w1", "w3", "w2")


def _block(config: Config, block: int) -> Shapes:
    hidden, experts = count(config, "hidden_size"), count(config, "num_local_experts", 8)
    return {
        **attention(config, attention_widths(config, key_heads=8)),
        "block_sparse_moe.gate.weight": (experts, hidden),
        **expert_shapes(_MODULE, _NAMES, experts, hidden, count(config, "intermediate_size")),
        **norms(config, "input_layernorm", "post_attention_layernorm"),
    }


def _silent(name: str) -> float | None:
    slot = expert_slot(_MODULE, _NAMES, name)
    is_last = name == "self_attn.o_proj.weight" or (slot is not None and slot.parameter.endswith("down_proj"))
    return 0.0 if is_last else None


def _slot(name: str) -> Slot:
    if name == "block_sparse_moe.gate.weight":
        return Slot("mlp.gate.weight")
    return expert_slot(_MODULE, _NAMES, name) or Slot(name)


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    block_shapes=_block,
    outer_shapes=outer,
    silent_value=_silent,
    config_keys=frozenset(
        {
            "head_dim", "hidden_act", "num_experts_per_tok", "num_local_experts", "output_router_logits",
            "router_aux_loss_coef", "router_jitter_noise", "sliding_window",
        }
    ),
    slot_in_block=_slot,
)  # fmt: skip
