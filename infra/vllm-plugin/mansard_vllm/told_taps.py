"""/v1/models of a node that gives the states of several layers says which: `carry_on_taps` in every card.

As many other layers have states of the same width, so nothing else would tell a capture that it asks the wrong node.
"""

import sys
from typing import Any


def tell_taps() -> None:
    """In processes that answer over HTTP, once; the taps are those that the model class reads."""
    if "vllm.entrypoints.openai" not in sys.modules:
        return
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    plain = OpenAIServingModels.show_available_models
    if getattr(plain, "tells_taps", False):
        return

    async def show_available_models(self: Any) -> Any:  # noqa: ANN401 - vLLM's own types
        listed = await plain(self)
        for card in listed.data:
            if taps := getattr(self.engine_client.model_config.hf_config, "carry_on_taps", None):
                card.carry_on_taps = list(taps)
        return listed

    show_available_models.tells_taps = True  # type: ignore[attr-defined]
    OpenAIServingModels.show_available_models = show_available_models
