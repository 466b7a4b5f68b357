"""A layer that keeps every token's states in the KV cache, so that prompts' states are there even for tokens that the
prefix cache answers. It costs L * D values a token of KV space, for all requests.

Legend: N tokens, L states a token (the final one, then the taps), D base width, W = L * D.
"""

from dataclasses import replace
from typing import ClassVar

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.extract_hidden_states import (
    CacheOnlyAttentionBackend,
    CacheOnlyAttentionLayer,
    CacheOnlyAttentionMetadataBuilder,
)
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import AttentionCGSupport

NAME = "carry_on.states."
"""Of the layer, before its number: how the scheduler knows it, which has no model."""


class _Builder(CacheOnlyAttentionMetadataBuilder):  # type: ignore[misc]
    """Keeping is one scatter by the step's slots, so a CUDA graph may hold it: users' decoding keeps its graphs."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS


class _Backend(CacheOnlyAttentionBackend):  # type: ignore[misc]
    @staticmethod
    def get_builder_cls() -> type[_Builder]:
        return _Builder


class KeptStates(CacheOnlyAttentionLayer):  # type: ignore[misc]
    """In the base's data type, whatever the keys and values are kept in."""

    def __init__(self, states: int, vllm_config: VllmConfig) -> None:
        config = vllm_config.model_config.hf_text_config
        cache = vllm_config.cache_config
        if is_quantized_kv_cache(cache.cache_dtype):
            cache = replace(cache, cache_dtype="auto")
        # Behind the base's layers: a name holds exactly one number.
        super().__init__(states, config.hidden_size, cache, f"{NAME}{config.num_hidden_layers}")
        self.attn_backend = _Backend

    def keep(self, states_NW: torch.Tensor) -> None:
        """Of the tokens of a step, where the cache has room for them."""
        self(states_NW.reshape(len(states_NW), self.num_heads, self.head_size))

    def read(self, blocks: list[int], block_tokens: int, tokens: int) -> torch.Tensor:
        """The first `tokens` states of a request with these blocks of `block_tokens` each, [tokens, W]."""
        device, kernel_tokens = self.kv_cache.device, self.kv_cache.shape[2]
        first_slots = torch.tensor(blocks, device=device) * block_tokens
        slots_N = (first_slots[:, None] + torch.arange(block_tokens, device=device)).flatten()[:tokens]
        return self.kv_cache[slots_N // kernel_tokens, :, slots_N % kernel_tokens].flatten(1)
