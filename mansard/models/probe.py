"""What a model answers on a probe: plain logits, and greedy generation through the key-value cache.

Two models are compared bit for bit on these answers, so they are asked the same way: one forward pass over the whole
probe, then one pass over the prompt and one a token, by one named attention kernel (`attention_kernels`). Everything
comes back to the CPU. Where the CPU computes, it does so on one thread: with another number of threads sums are taken
in another order and the last bits differ (measured 2026-11-22, hidden 512), so answers of two processes could not be
compared.

Shapes: B sequences, T tokens, G generated tokens, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from mansard.models.attention_kernels import attention_by


@dataclass(frozen=True, slots=True)
class Answers:
    """Logits [B, T, V] of the probe, and what greedy generation after it chose [B, G] from which logits [B, G, V]."""

    logits_BTV: torch.Tensor
    chosen_BG: torch.Tensor
    step_logits_BGV: torch.Tensor


def random_probe(vocabulary: int, sequences: int, tokens: int, seed: int) -> torch.Tensor:
    """Random token ids, int64 [sequences, tokens]; the same for the same arguments."""
    return torch.randint(vocabulary, (sequences, tokens), generator=torch.Generator().manual_seed(seed))


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes on one CPU thread while the context lasts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def forward_logits(model: PreTrainedModel, ids_BT: torch.Tensor, kernel: str) -> torch.Tensor:
    """Logits [B, T, V] of one forward pass without a cache, on the CPU, in the type the model computes in."""
    with torch.inference_mode(), one_thread(), attention_by(kernel, model.device):
        return model(input_ids=ids_BT.to(model.device), use_cache=False).logits.cpu()


def answers(model: PreTrainedModel, ids_BT: torch.Tensor, generated_tokens: int, kernel: str) -> Answers:
    """Everything of `Answers`; generation never stops early."""
    chosen, step_logits = [], []
    with torch.inference_mode(), one_thread(), attention_by(kernel, model.device):
        output = model(input_ids=ids_BT.to(model.device), use_cache=True)
        for _ in range(generated_tokens):
            logits_BV = output.logits[:, -1]
            next_B1 = logits_BV.argmax(dim=-1, keepdim=True)
            chosen.append(next_B1.cpu())
            step_logits.append(logits_BV.cpu())
            output = model(input_ids=next_B1, past_key_values=output.past_key_values, use_cache=True)
    return Answers(forward_logits(model, ids_BT, kernel), torch.cat(chosen, dim=1), torch.stack(step_logits, dim=1))


def are_bit_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Same type, same shape, same bytes."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return bool(torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)))


def max_abs_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest absolute difference of two tensors of one shape, in float64."""
    return float((one.double() - other.double()).abs().max())
