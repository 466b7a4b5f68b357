"""The chunked loss over a frozen head is cross-entropy, and so is its gradient."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from mansard.training import head_loss
from mansard.training.head_loss import HeadLoss, chunk_rows
from mansard.training.packing import IGNORED

CPU = torch.device("cpu")


def parts(trains: bool) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(24, 60, bias=False).requires_grad_(trains)
    labels = torch.randint(60, (3, 50))
    labels[:, ::7] = IGNORED
    return head, torch.randn(3, 50, 24), labels


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk_values", [60 * 16, 2**26])
def test_value_and_gradient_are_those_of_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None, chunk_values: int
) -> None:
    monkeypatch.setattr(head_loss, "CHUNK_VALUES", chunk_values)
    head, hidden, labels = parts(trains=False)
    found, exact = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    nats = HeadLoss(head, softcap, CPU)(found, labels)
    logits = head(exact).flatten(0, 1)
    logits = logits if softcap is None else (logits / softcap).tanh() * softcap
    reference = cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(nats, reference)
    (nats / 7).backward()
    (reference / 7).backward()
    assert found.grad is not None and exact.grad is not None
    torch.testing.assert_close(found.grad, exact.grad)


def test_a_head_that_trains_gets_its_gradient() -> None:
    head, hidden, labels = parts(trains=True)
    HeadLoss(head, None, CPU)(hidden, labels).backward()
    assert head.weight.grad is not None and head.weight.grad.any()


def test_without_gradient_the_value_is_the_same() -> None:
    head, hidden, labels = parts(trains=False)
    loss = HeadLoss(head, None, CPU)
    with torch.no_grad():
        silent = loss(hidden, labels)
    assert torch.equal(silent, loss(hidden.requires_grad_(), labels).detach())


def test_chunks_are_bounded_powers_of_two() -> None:
    assert chunk_rows(32_000) == 2048
    assert chunk_rows(256_000) * 256_000 <= head_loss.CHUNK_VALUES
