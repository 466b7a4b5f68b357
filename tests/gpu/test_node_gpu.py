"""On an accelerator: steps played from CUDA graphs give the gradients that plain autograd gives on a CPU."""

import copy
from typing import Any

import pytest
import torch

from mansard.carry_on.branch import Branch, packed_mask
from mansard.carry_on.flat import FlatWeights
from mansard.carry_on.head import Head
from mansard.carry_on.loader import Part, read_parts
from mansard.carry_on.node_engine import BranchEngine
from mansard.carry_on.wire import Coded, Scheme, decode, encode, moved
from mansard.composition.shape import shape_of
from mansard.training.data import Batch
from mansard.training.optimizer import Group, MasterAdamW

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator"),
    pytest.mark.filterwarnings("ignore"),  # torch's compiler warns of its own ways
]
ROWS, TOKENS, WIDTH, VOCABULARY = 4, 128, 128, 1000
MICRO = 2 * TOKENS


class Held:
    """States of one batch; its rows are asked for in order."""

    def __init__(self, x_BTD: torch.Tensor, scheme: Scheme, are_computed: bool) -> None:
        self.x_BTD, self.scheme, self.are_computed = x_BTD, scheme, are_computed

    def parts(self, batch: Batch) -> list[Part]:
        """In pinned memory, or as a base on the same GPU gives them: asked for, and not there yet."""
        self.next_row = 0
        if self.are_computed:
            torch.cuda._sleep(100_000_000)
        return read_parts(self, batch, MICRO, is_pinned=not self.are_computed)

    def of(self, batch: Batch) -> tuple[Coded, list[int]]:
        rows = range(self.next_row, self.next_row + len(batch.tokens_BT))
        self.next_row = rows.stop
        first_rows = [i * TOKENS for i in range(len(rows))]
        coded = encode(self.x_BTD[rows.start : rows.stop].flatten(0, 1), first_rows, self.scheme)
        return (moved(coded, torch.device("cuda", 0)) if self.are_computed else coded), first_rows

    def decoded(self) -> torch.Tensor:
        starts = list(range(0, ROWS * TOKENS, TOKENS))
        coded = encode(self.x_BTD.flatten(0, 1), starts, self.scheme)
        return decode(coded, torch.tensor(starts), torch.float32).view_as(self.x_BTD)


def whole_graph(branch: Branch, x_BTD: torch.Tensor, batch: Batch, rows_VD: torch.Tensor) -> tuple[float, Any]:
    """Loss and gradients on the CPU in float32."""
    branch.zero_grad()
    y_BTD = x_BTD + 0.7 * branch(x_BTD, batch.positions_BT, packed_mask(batch.positions_BT))
    logits_NV = (y_BTD @ rows_VD.T).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits_NV, batch.labels_BT.flatten(), ignore_index=-100)
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in branch.named_parameters()}


@pytest.mark.parametrize(("dtype", "scheme", "far", "are_computed"), [
    (torch.float32, "bf16", 3e-4, False), (torch.float32, "fp8", 3e-4, False), (torch.bfloat16, "bf16", 3e-2, False),
    (torch.float32, "bf16", 3e-4, True),
])  # fmt: skip
def test_played_steps_give_the_gradients_of_one_whole_graph(
    dtype: torch.dtype, scheme: Scheme, far: float, are_computed: bool
) -> None:
    torch.manual_seed(0)
    reference = Branch(shape_of(WIDTH, 64, 2))
    reference.start(1)
    with torch.no_grad():
        reference.output.normal_(0, 0.1)
        for parameter in reference.parameters():
            parameter.copy_(parameter.to(dtype))
    rows_VD = torch.randn(VOCABULARY, WIDTH).to(dtype).float()
    branch = copy.deepcopy(reference)
    weights = FlatWeights(branch, torch.device("cuda", 0), dtype)
    optimizer = MasterAdamW([Group("branch", 1e-3, weights.parameters)], 0.0)
    head = Head(rows_VD, torch.device("cuda", 0), dtype, chunk_rows=192)
    states = Held(torch.zeros(ROWS, TOKENS, WIDTH), scheme, are_computed)
    engine = BranchEngine(weights, head, states, optimizer, 0.7, 1.0)
    for _ in range(5):  # done, recorded, played, on other data each
        x_BTD = torch.randn(ROWS, TOKENS, WIDTH)
        x_BTD[:, 0] *= 30
        states.x_BTD = x_BTD
        positions_BT = torch.arange(TOKENS).repeat(ROWS, 1)
        positions_BT[2, 50:] = torch.arange(TOKENS - 50)
        labels_BT = torch.randint(0, VOCABULARY, (ROWS, TOKENS))
        labels_BT[:, -1] = -100
        batch = Batch(torch.randint(0, VOCABULARY, (ROWS, TOKENS)), positions_BT, labels_BT)
        loss = engine.gradients(batch)
        wanted, gradients = whole_graph(reference, states.decoded(), batch, rows_VD)
        assert loss.mean == pytest.approx(wanted, rel=far)
        for name, parameter in branch.named_parameters():
            distance = (parameter.grad.float().cpu() - gradients[name]).norm() / gradients[name].norm()
            assert distance < far, (name, float(distance))
        assert engine.evaluate([batch]).mean == pytest.approx(wanted, rel=far)
