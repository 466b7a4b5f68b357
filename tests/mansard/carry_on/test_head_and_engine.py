"""The streamed head and the three-phase step against plain autograd."""

from typing import Any

import pytest

from mansard.composition.shape import shape_of

pytestmark = pytest.mark.slow


def reference(y_ND: Any, rows_VD: Any, labels_N: Any) -> tuple[Any, Any]:
    """Loss (mean) and its gradient at y by torch."""
    import torch

    y = y_ND.detach().clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(y @ rows_VD.T, labels_N, ignore_index=-100)
    loss.backward()
    return loss.detach(), y.grad


@pytest.mark.parametrize("chunk_rows", [7, 64, 1000])
def test_the_streamed_head_computes_cross_entropy_and_its_gradient(chunk_rows: int) -> None:
    import torch

    from mansard.carry_on.head import Head
    from mansard.carry_on.streamed_loss import head_loss

    torch.manual_seed(0)
    rows_VD, y_ND = torch.randn(301, 16), torch.randn(50, 16) * 3
    labels_N = torch.randint(0, 301, (50,))
    labels_N[[0, 13, 49]] = -100
    head = Head(rows_VD, torch.device("cpu"), torch.float32, chunk_rows)
    loss, gradient = reference(y_ND, rows_VD, labels_N)
    found = head_loss(head, y_ND, labels_N, torch.empty(50, 16))
    assert found.labels == 47
    torch.testing.assert_close(found.nats_N.sum() / 47, loss)
    torch.testing.assert_close(y_ND, gradient, atol=1e-6, rtol=1e-4)  # it took y's place


def test_states_far_from_zero_do_not_overflow_the_softmax() -> None:
    import torch

    from mansard.carry_on.head import Head
    from mansard.carry_on.streamed_loss import head_loss

    torch.manual_seed(0)
    rows_VD, y_ND = torch.randn(64, 8) * 40, torch.randn(5, 8) * 40
    labels_N = torch.randint(0, 64, (5,))
    loss, gradient = reference(y_ND, rows_VD, labels_N)
    assert float((y_ND @ rows_VD.T).amax(-1).sub((y_ND @ rows_VD[:16].T).amax(-1)).max()) > 90  # beyond float32's exp
    found = head_loss(Head(rows_VD, torch.device("cpu"), torch.float32, 16), y_ND, labels_N, torch.empty(5, 8))
    torch.testing.assert_close(found.nats_N.sum() / 5, loss)
    torch.testing.assert_close(y_ND, gradient, atol=1e-4, rtol=1e-4)


class Held:
    """States of one batch, in float32, as a cache would give them."""

    def __init__(self, x_BTD: Any) -> None:
        self.x_BTD = x_BTD
        self.row = 0

    def parts(self, batch: Any) -> Any:
        from mansard.carry_on.loader import read_parts

        # Two rows a micro-batch, so that parts are joined.
        return read_parts(self, batch, micro_tokens=24, is_pinned=False)

    def of(self, batch: Any) -> tuple[Any, list[int]]:
        from mansard.carry_on.wire import Coded

        rows = [int(t[0]) for t in batch.tokens_BT]  # the first token names the row
        return Coded(self.x_BTD[rows].flatten(0, 1)), []


def test_the_three_phases_give_the_gradients_of_one_whole_graph() -> None:
    import torch

    from mansard.carry_on.branch import Branch, packed_mask
    from mansard.carry_on.flat import FlatWeights
    from mansard.carry_on.head import Head
    from mansard.carry_on.node_engine import BranchEngine
    from mansard.training.data import Batch
    from mansard.training.optimizer import Group, MasterAdamW

    torch.manual_seed(0)
    shape = shape_of(32, 16, 2)
    branch = Branch(shape)
    branch.start(1)
    with torch.no_grad():
        branch.output.normal_(0, 0.1)
    rows_VD, x_BTD = torch.randn(61, 32), torch.randn(5, 12, 32)
    tokens_BT = torch.randint(5, 61, (5, 12))
    tokens_BT[:, 0] = torch.arange(5)
    positions_BT = torch.arange(12).repeat(5, 1)
    positions_BT[2, 7:] = torch.arange(5)
    labels_BT = torch.randint(0, 61, (5, 12))
    labels_BT[:, -1] = -100
    weights = FlatWeights(branch)
    optimizer = MasterAdamW([Group("branch", 1e-3, weights.parameters)], 0.0)
    head = Head(rows_VD, torch.device("cpu"), torch.float32, 10)
    engine = BranchEngine(weights, head, Held(x_BTD), optimizer, 0.7, 1.0)
    for _ in range(2):  # the second step finds the memory that the first one left
        loss = engine.gradients(Batch(tokens_BT, positions_BT, labels_BT))
        found = {n: p.grad.clone() for n, p in branch.named_parameters()}
    branch.zero_grad()
    y_BTD = x_BTD + 0.7 * branch(x_BTD, positions_BT, packed_mask(positions_BT))
    whole = torch.nn.functional.cross_entropy((y_BTD @ rows_VD.T).flatten(0, 1), labels_BT.flatten(), ignore_index=-100)
    whole.backward()
    assert loss.mean == pytest.approx(float(whole.detach()), rel=1e-5)
    for name, parameter in branch.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-3)
