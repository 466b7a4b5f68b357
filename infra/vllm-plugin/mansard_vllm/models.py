"""Model classes: the base's own, and the branch between its final norm and its head.

config.json's `carry_on` section is either {"file": path of the branch in the model's folder, "alpha", "base",
"branch"}: one branch, always on; or {"slots", "shape", "base"}: many branches of one shape, chosen per request as LoRA
adapters are (slots.py). At alpha 0, and for requests that name no branch, the base's states pass untouched. A branch
that taps layers gets their states beside the final one. CarryOnTaps... classes give just these states away, in pooling
mode, to those who train such branches; CarryOnStates... classes serve users and keep these states for the prompts that
ask for them (connector.py). Legend: N tokens of a step, D base width, W all states' width.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.sequence import IntermediateTensors

from mansard_vllm.branch import ALL, Branch, check_description, read_description
from mansard_vllm.kept_states import KeptStates
from mansard_vllm.slots import Slots


def tap(model: Any, taps: Sequence[int]) -> None:  # noqa: ANN401 - a family's ForCausalLM
    """Have the base's layers give their states too (vLLM counts as we do: before layer i is after i layers)."""
    if taps and get_pp_group().world_size > 1:
        raise ValueError("a branch that taps layers is served without pipeline parallelism; use tensor parallelism")
    if taps:
        model.set_aux_hidden_state_layers(tuple(taps))


def side_by_side(found: Any) -> torch.Tensor | IntermediateTensors:  # noqa: ANN401 - what the base's forward gave
    """The final state, and the tapped ones where there are any, [N, W]."""
    if isinstance(found, tuple):
        x_ND, tapped = found
        return torch.cat([x_ND, *tapped], dim=-1)
    return found


class CarryOn:
    """What a family's class becomes a carry-on with. Mixed in before it."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        section = vllm_config.model_config.hf_config.carry_on
        width = vllm_config.model_config.hf_text_config.hidden_size
        self.is_last = get_pp_group().is_last_rank
        self.carry_on_slots: Slots | None = None
        if "slots" in section:
            self.carry_on = Branch(section["shape"], vllm_config, section["slots"] + 1)
            tap(self, self.carry_on.taps)
            tokens = vllm_config.scheduler_config.max_num_batched_tokens
            self.carry_on_slots = Slots(self.carry_on, section["base"], section["slots"], tokens)
            return
        self.alpha = float(section["alpha"])
        self.branch_file = Path(vllm_config.model_config.model) / section["file"]
        described = read_description(self.branch_file)
        check_description(described, section["base"], width, str(self.branch_file))
        if self.is_last:
            self.carry_on = Branch(described["shape"], vllm_config)
        tap(self, described["shape"].get("taps", ()))

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """y, for the tokens of this step; between pipeline stages what the base passes on."""
        states_NW = side_by_side(
            super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)  # type: ignore[misc]
        )
        if not self.is_last:
            return states_NW
        if self.carry_on_slots is not None:
            return self.carry_on_slots.joined(positions, states_NW)
        x_ND = states_NW[:, : self.carry_on.shape["base_width"]]
        delta_ND = self.carry_on(positions, states_NW, [(0, ALL)])
        return x_ND if self.alpha == 0.0 else x_ND + self.alpha * delta_ND

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """The base's weights as vLLM gives them, and the branch's from its own file, complete or not at all."""
        loaded: set[str] = set(super().load_weights(weights))  # type: ignore[misc]
        if self.carry_on_slots is not None:
            return loaded | {f"carry_on.{name}" for name, _ in self.carry_on.named_parameters()}
        if self.is_last:
            loaded |= {f"carry_on.{name}" for name in self.carry_on.load(self.branch_file)}
        return loaded


class Taps:
    """The final state and those after the layers of config.json's `carry_on_taps`, W wide. Mixed in before a family's
    class, for pooling mode."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        tap(self, vllm_config.model_config.hf_config.carry_on_taps)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        return side_by_side(
            super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)  # type: ignore[misc]
        )


class KeepsStates:
    """The base, untouched, for users; the final state and those after the layers of `carry_on_taps` (none: the final
    one alone) are kept beside keys and values. Mixed in before a family's class."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        taps = getattr(vllm_config.model_config.hf_config, "carry_on_taps", ())
        tap(self, taps)
        self.kept_states = KeptStates(1 + len(taps), vllm_config)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x, as the base alone gives it."""
        found = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)  # type: ignore[misc]
        self.kept_states.keep(side_by_side(found))
        x_ND: torch.Tensor = found[0] if isinstance(found, tuple) else found
        return x_ND


class CarryOnLlamaForCausalLM(CarryOn, LlamaForCausalLM):  # type: ignore[misc]
    """A Llama with a branch."""


class CarryOnMistralForCausalLM(CarryOn, MistralForCausalLM):  # type: ignore[misc]
    """A Mistral with a branch."""


class CarryOnQwen2ForCausalLM(CarryOn, Qwen2ForCausalLM):  # type: ignore[misc]
    """A Qwen2 with a branch."""


class CarryOnQwen3ForCausalLM(CarryOn, Qwen3ForCausalLM):  # type: ignore[misc]
    """A Qwen3 with a branch."""


class CarryOnTapsLlamaForCausalLM(Taps, LlamaForCausalLM):  # type: ignore[misc]
    """The states of a Llama, taps beside them."""


class CarryOnTapsMistralForCausalLM(Taps, MistralForCausalLM):  # type: ignore[misc]
    """The states of a Mistral, taps beside them."""


class CarryOnTapsQwen2ForCausalLM(Taps, Qwen2ForCausalLM):  # type: ignore[misc]
    """The states of a Qwen2, taps beside them."""


class CarryOnTapsQwen3ForCausalLM(Taps, Qwen3ForCausalLM):  # type: ignore[misc]
    """The states of a Qwen3, taps beside them."""


class CarryOnStatesLlamaForCausalLM(KeepsStates, LlamaForCausalLM):  # type: ignore[misc]
    """A Llama for users, whose states are kept."""


class CarryOnStatesMistralForCausalLM(KeepsStates, MistralForCausalLM):  # type: ignore[misc]
    """A Mistral for users, whose states are kept."""


class CarryOnStatesQwen2ForCausalLM(KeepsStates, Qwen2ForCausalLM):  # type: ignore[misc]
    """A Qwen2 for users, whose states are kept."""


class CarryOnStatesQwen3ForCausalLM(KeepsStates, Qwen3ForCausalLM):  # type: ignore[misc]
    """A Qwen3 for users, whose states are kept."""
