"""/v1/models of a node says what nothing else of vLLM's does, in every card: `carry_on_taps`, the layers whose states
it gives, and `carry_on_quantization`, how its weights are kept.

As many other layers have states of the same width, and another quantization has states of the same shape, so nothing
else would tell a capture that it asks the wrong node.
"""

import sys
from typing import Any

NOT_QUANTIZED = "none"
"""Weights as they were trained: neither the checkpoint nor the command line quantizes them."""


def tell_cards() -> None:
    """In processes that answer over HTTP, once; the taps are those that the model class reads."""
    if "vllm.entrypoints.openai" not in sys.modules:
        return
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    plain = OpenAIServingModels.show_available_models
    if getattr(plain, "tells_cards", False):
        return

    async def show_available_models(self: Any) -> Any:  # noqa: ANN401 - vLLM's own types
        listed = await plain(self)
        config = self.engine_client.model_config
        for card in listed.data:
            card.carry_on_quantization = quantization_of(config)
            if taps := getattr(config.hf_config, "carry_on_taps", None):
                card.carry_on_taps = list(taps)
        return listed

    show_available_models.tells_cards = True  # type: ignore[attr-defined]
    OpenAIServingModels.show_available_models = show_available_models


def quantization_of(config: Any) -> str:  # noqa: ANN401 - vLLM's ModelConfig
    """The checkpoint's own `quant_method`, which vLLM lets no argument contradict (`config.quantization` would name the
    kernel, awq_marlin for awq); else what --quantization makes of plain weights; else `none`."""
    checkpoint = config.model_arch_config.quantization_config
    return str((checkpoint or {}).get("quant_method") or config.quantization or NOT_QUANTIZED)
