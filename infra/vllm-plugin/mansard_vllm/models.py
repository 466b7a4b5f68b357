"""Model classes: the base's own, and the branch between its final norm and its head.

config.json's `carry_on` section is either {"file": path of the branch in the model's folder, "alpha", "base",
"branch"}: one branch, always on; or {"slots", "shape", "base"}: many branches of one shape, chosen per request as LoRA
adapters are (slots.py). At alpha 0, and for requests that name no branch, the base's states pass untouched.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.sequence import IntermediateTensors

from mansard_vllm.branch import ALL, Branch, check_description, read_description
from mansard_vllm.slots import Slots


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
            tokens = vllm_config.scheduler_config.max_num_batched_tokens
            self.carry_on_slots = Slots(self.carry_on, section["base"], section["slots"], tokens)
            return
        self.alpha = float(section["alpha"])
        self.branch_file = Path(vllm_config.model_config.model) / section["file"]
        described = read_description(self.branch_file)
        check_description(described, section["base"], width, str(self.branch_file))
        if self.is_last:
            self.carry_on = Branch(described["shape"], vllm_config)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """y, for the tokens of this step; between pipeline stages what the base passes on."""
        x_ND: torch.Tensor = super().forward(  # type: ignore[misc]
            input_ids, positions, intermediate_tensors, inputs_embeds
        )
        if not self.is_last:
            return x_ND
        if self.carry_on_slots is not None:
            return self.carry_on_slots.joined(positions, x_ND)
        delta_ND = self.carry_on(positions, x_ND, [(0, ALL)])
        return x_ND if self.alpha == 0.0 else x_ND + self.alpha * delta_ND

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """The base's weights as vLLM gives them, and the branch's from its own file, complete or not at all."""
        loaded: set[str] = set(super().load_weights(weights))  # type: ignore[misc]
        if self.carry_on_slots is not None:
            return loaded | {f"carry_on.{name}" for name, _ in self.carry_on.named_parameters()}
        if self.is_last:
            loaded |= {f"carry_on.{name}" for name in self.carry_on.load(self.branch_file)}
        return loaded


class CarryOnLlamaForCausalLM(CarryOn, LlamaForCausalLM):  # type: ignore[misc]
    """A Llama with a branch."""


class CarryOnMistralForCausalLM(CarryOn, MistralForCausalLM):  # type: ignore[misc]
    """A Mistral with a branch."""


class CarryOnQwen2ForCausalLM(CarryOn, Qwen2ForCausalLM):  # type: ignore[misc]
    """A Qwen2 with a branch."""


class CarryOnQwen3ForCausalLM(CarryOn, Qwen3ForCausalLM):  # type: ignore[misc]
    """A Qwen3 with a branch."""
