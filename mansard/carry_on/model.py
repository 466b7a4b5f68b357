"""Base and branch as one Hugging Face model: for evaluation and `generate`, with the branch's own KV cache.

The branch's keys and values live in the base's cache object, in layers behind the base's. alpha is a plain attribute
and may be changed between calls; at 0 the base's logits come out bit for bit. Tapped layers' states are taken by hooks
while the base runs. Does not cover static caches, sliding windows in the branch, or bases that change the head's logits
(Gemma's softcap is refused). Legend: B rows, T tokens, D base width, W all states' width, S keys.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from mansard.carry_on.branch import Branch, joined
from mansard.carry_on.branch_file import load_branch
from mansard.errors import BadInput
from mansard.models.loading import load_model
from mansard.records import SnapshotId


class CarryOnForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """y(alpha) = W_head (x + alpha * g * f). `others` are the bases of a mixture beside `base`, whose head is used."""

    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    """The base's attention is as it was loaded; this class has none of its own that could be told otherwise."""

    def __init__(
        self, base: PreTrainedModel, branch: Branch, alpha: float, others: Sequence[PreTrainedModel] = ()
    ) -> None:
        super().__init__(base.config)
        width = base.get_output_embeddings().weight.shape[1]
        if branch.shape.base_width != width:
            raise BadInput(f"a branch for width {branch.shape.base_width} does not fit a base of width {width}")
        if getattr(base.config, "final_logit_softcapping", None) is not None:
            raise BadInput("this base caps its logits after the head; carry-ons of such bases are not supported")
        widths = tuple(other.get_output_embeddings().weight.shape[1] for other in others)
        if branch.shape.others != widths:
            raise BadInput(f"a branch beside bases of widths {list(branch.shape.others)}; given: {list(widths)}")
        self.base = base
        self.others = nn.ModuleList(others)
        self.branch = branch
        self.alpha = alpha
        self.generation_config = base.generation_config

    def get_input_embeddings(self) -> Any:  # noqa: ANN401 - a module
        return self.base.get_input_embeddings()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: object,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] (the last `logits_to_keep` of T where it is above 0); `attention_mask` [B, S]: 0 at pads."""
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = _positions(input_ids, attention_mask, seen)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        caches = self._caches(past_key_values)
        states_BTW = torch.cat(
            [
                tapped_states(
                    base.get_decoder(), taps, **inputs, past_key_values=next(caches), use_cache=use_cache
                )
                for base, taps in ((self.base, self.branch.shape.taps), *((other, ()) for other in self.others))
            ],
            dim=-1,
        )
        x_BTD = states_BTW[..., : self.branch.shape.base_width]
        mask = _mask(input_ids, attention_mask, seen)
        delta_BTD = self.branch(states_BTW, position_ids.expand(len(input_ids), -1), mask, self._keep(past_key_values))
        y_BTD = joined(x_BTD, delta_BTD, self.alpha)[:, -logits_to_keep:]
        return CausalLMOutputWithPast(logits=self.base.get_output_embeddings()(y_BTD), past_key_values=past_key_values)

    def _caches(self, cache: Cache | None) -> Iterator[Cache | None]:
        """Every base's cache: the given one, and for the others views of layers behind the base's and the branch's, so
        that what is done to all layers (beams sorted, tokens taken back) is done to theirs."""
        yield cache
        begin = _layers(self.base) + self.branch.shape.blocks
        for other in self.others:
            if cache is None:
                yield None
                continue
            end = begin + _layers(other)
            _lengthen(cache, end)
            view = DynamicCache()
            view.layers = cache.layers[begin:end]
            begin = end
            yield view

    def _keep(self, cache: Cache | None) -> Any:  # noqa: ANN401 - a branch's Keep, or None
        if cache is None:
            return None
        first = _layers(self.base)
        _lengthen(cache, first + self.branch.shape.blocks)

        def keep(number: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            kept: tuple[torch.Tensor, torch.Tensor] = cache.layers[first + number].update(keys, values)
            return kept

        return keep


def _layers(base: Any) -> int:  # noqa: ANN401 - a transformers model
    return int(base.config.get_text_config().num_hidden_layers)


def _lengthen(cache: Cache, layers: int) -> None:
    while len(cache.layers) < layers:
        cache.layers.append(DynamicLayer())


def tapped_states(decoder: Any, taps: Sequence[int], **inputs: Any) -> torch.Tensor:  # noqa: ANN401 - the decoder's
    """[B, T, W]: the decoder's final state and its state after each tapped layer, side by side."""
    found: dict[int, torch.Tensor] = {}

    def keeps(tap: int) -> Any:  # noqa: ANN401 - a forward hook
        def hook(_module: object, _inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            found[tap] = output if isinstance(output, torch.Tensor) else output[0]

        return hook

    handles = [decoder.layers[tap - 1].register_forward_hook(keeps(tap)) for tap in taps]
    try:
        x_BTD: torch.Tensor = decoder(**inputs).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat([x_BTD, *(found[tap] for tap in taps)], dim=-1) if taps else x_BTD


def load_carry_on(
    base_tree: Path,
    base: SnapshotId,
    branch_file: Path,
    alpha: float,
    dtype: torch.dtype | None = None,
    others: Mapping[SnapshotId, Path] | None = None,
) -> CarryOnForCausalLM:
    """Base and branch; `base` is the snapshot that `base_tree` was laid out from, `others` those of a mixture in their
    order, and their trees. BadInput for another one's branch."""
    beside = others or {}
    branch, _ = load_branch(branch_file, base, dtype, list(beside))
    loaded = [load_model(tree, dtype) for tree in beside.values()]
    model = CarryOnForCausalLM(load_model(base_tree, dtype), branch, alpha, loaded)
    model.eval()
    return model


def _positions(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, seen: int) -> torch.Tensor:
    tokens = input_ids.shape[1]
    if attention_mask is None:
        return torch.arange(seen, seen + tokens, device=input_ids.device)[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]


def _mask(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, seen: int) -> torch.Tensor:
    """[B, 1, T, S]: causal after `seen` cached tokens, pads hidden (each token sees at least itself)."""
    tokens = input_ids.shape[1]
    keys = torch.arange(seen + tokens, device=input_ids.device)
    here = keys[seen:, None]
    causal = (keys[None] <= here)[None, None]
    if attention_mask is None:
        return causal
    return causal & (attention_mask[:, None, None, :].bool() | (keys[None] == here)[None, None])
