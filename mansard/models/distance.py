"""How far one model's predictions are from another's on a fixed probe: mean KL in nats per token, perplexity of both.

Window by window in float64. The first model's logits are kept (on the CPU, in the type it computed), so the two models
are never in memory together.

Shapes: W windows, T tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy, log_softmax
from transformers import PreTrainedModel

from mansard.models.probe import forward_logits

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Distance:
    """KL(reference || other) and perplexities exp(mean negative log-likelihood of the next token)."""

    kl_nats_per_token: float
    perplexity_reference: float
    perplexity_other: float


def probe_logits(
    model: PreTrainedModel, probe_WT: torch.Tensor, kernel: str, told: Callable[[int], None] = lambda done: None
) -> list[torch.Tensor]:
    """One logits tensor [T, V] a window, on the CPU, by the attention kernel of that name, which both models of a
    distance take; `told` hears the number of windows done."""
    logits = []
    for number, window_T in enumerate(probe_WT, start=1):
        logits.append(forward_logits(model, window_T[None], kernel)[0])
        told(number)
    return logits


def distance(
    reference: Sequence[torch.Tensor],
    other: Sequence[torch.Tensor],
    probe_WT: torch.Tensor,
    device: torch.device = CPU,
) -> Distance:
    """Distance of `other`'s logits to `reference`'s, both as `probe_logits` returns them for `probe_WT`; computed on
    `device`, a window at a time."""
    kl = nll_reference = nll_other = 0.0
    for reference_TV, other_TV, window_T in zip(reference, other, probe_WT, strict=True):
        log_p_TV = log_softmax(reference_TV.to(device).double(), dim=-1)
        log_q_TV = log_softmax(other_TV.to(device).double(), dim=-1)
        targets = window_T[1:].to(device)
        kl += float((log_p_TV.exp() * (log_p_TV - log_q_TV)).sum())
        nll_reference += float(cross_entropy(log_p_TV[:-1], targets, reduction="sum"))
        nll_other += float(cross_entropy(log_q_TV[:-1], targets, reduction="sum"))
    windows, tokens = probe_WT.shape
    predicted = windows * (tokens - 1)
    mean_nll = torch.tensor([nll_reference / predicted, nll_other / predicted], dtype=torch.float64)
    perplexity_reference, perplexity_other = mean_nll.exp().tolist()  # infinite where it overflows, unlike math.exp
    return Distance(kl / (windows * tokens), perplexity_reference, perplexity_other)
