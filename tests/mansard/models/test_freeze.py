"""Exact names decide what trains; digests see every change of a frozen tensor in memory."""

import pytest

from mansard.digest import digest_bytes

pytestmark = pytest.mark.slow


def model():  # noqa: ANN201 - torch is imported late
    import torch
    from torch import nn

    torch.manual_seed(0)
    net = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4) for _ in range(11)]), "head": nn.Linear(4, 4)})
    net.register_buffer("scales", torch.arange(6, dtype=torch.int32))
    net.register_buffer("scratch", torch.zeros(3, dtype=torch.bfloat16), persistent=False)
    return net


def test_only_exactly_named_parameters_train() -> None:
    from mansard.models.freeze import freeze_except

    net = model()
    frozen = freeze_except(net, {"layers.1.weight"})
    assert [n for n, p in net.named_parameters() if p.requires_grad] == ["layers.1.weight"]
    assert "layers.10.weight" in frozen and "scales" in frozen and "scratch" in frozen
    assert "layers.1.weight" not in frozen and len(frozen) == 12 * 2 - 1 + 2


def test_unknown_name_is_refused() -> None:
    from mansard.models.freeze import freeze_except

    with pytest.raises(ValueError, match=r"layers\.99\.weight is no parameter"):
        freeze_except(model(), {"layers.99.weight", "head.weight"})


def test_trained_tied_tensor_is_frozen_under_neither_name() -> None:
    from mansard.models.freeze import freeze_except

    net = model()
    net["head"].weight = net["layers"][0].weight
    frozen = freeze_except(net, {"head.weight"})
    assert "head.weight" not in frozen and "layers.0.weight" not in frozen


def test_digest_is_that_of_the_bytes() -> None:
    import torch

    from mansard.models.freeze import digest_tensors

    net = model()
    net["head"].weight = torch.nn.Parameter(torch.arange(16, dtype=torch.float32).reshape(4, 4).t())
    digests = digest_tensors(net, ["head.weight", "scales", "scratch"])
    transposed = torch.arange(16, dtype=torch.float32).reshape(4, 4).t().contiguous().numpy().tobytes()
    assert digests["head.weight"] == digest_bytes(transposed)
    assert digests["scales"] == digest_bytes(torch.arange(6, dtype=torch.int32).numpy().tobytes())
    assert digests["scratch"] == digest_bytes(bytes(6))


@pytest.mark.parametrize("name", ["head.bias", "scales", "scratch"])
def test_one_changed_element_is_named(name: str) -> None:
    import torch

    from mansard.models.freeze import compare, digest_tensors, freeze_except

    net = model()
    frozen = freeze_except(net, {"layers.1.weight"})
    before = digest_tensors(net, frozen)
    with torch.no_grad():
        net["layers"][1].weight.add_(1)
        dict([*net.named_parameters(), *net.named_buffers()])[name].view(-1)[2] += 1
    assert compare(before, digest_tensors(net, frozen)) == [name]


def test_missing_tensor_counts_as_changed() -> None:
    from mansard.models.freeze import compare

    assert compare({"a": "1", "b": "2"}, {"b": "2", "c": "3"}) == ["a", "c"]
