"""The forecast: its arithmetic, what it measures, what it refuses, and that it leaves the training as it was."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mansard.errors import BadInput
from mansard.specs.training import LearningRates, Train
from mansard.training.data import Batch, as_batch
from mansard.training.engines import LocalEngine
from mansard.training.linear_product import shorten
from mansard.training.memory import available_bytes, taken_bytes
from mansard.training.optimizer import Group
from mansard.training.packing import pack
from mansard.training.preflight import GIB, BlockCost, Costs, measure, preflight

SHAPE = {"vocabulary": 50, "hidden": 16, "intermediate": 32, "blocks": 4, "heads": 2, "max_tokens": 32}


def section(**others: Any) -> Train:
    return Train(
        tokens=64, batch_sequences=4, learning_rates=LearningRates(new_blocks=1e-2), precision="fp32", **others
    )


def engine(micro_batch: int | None = None, in_bf16: bool = False) -> tuple[Any, LocalEngine]:
    from mansard.demo.base import untrained_model
    from mansard.models.freeze import freeze_except

    model = untrained_model(SHAPE, 0)
    names = {name for name, _ in model.named_parameters() if name.startswith("model.layers.1.")}
    freeze_except(model, names)
    shorten(model.get_decoder().layers, frozen=in_bf16, trained=in_bf16)
    group = Group("new_blocks", 1e-2, {n: p for n, p in model.named_parameters() if n in names})
    return model, LocalEngine(model, [group], 0.0, 1.0, micro_batch_sequences=micro_batch)


def batch() -> Batch:
    return as_batch(*pack([[2 + (i * j) % 40 for j in range(1, 30)] for i in range(1, 5)], 16, 0)).parts(4)[0]


def costs(micro_batches: int = 1) -> Costs:
    """Two blocks with a graph over one without: states of 10, weights of 1000."""
    below = BlockCost(False, 0, 0, 0, 1.0, 0.0)
    trained, frozen = BlockCost(True, 100, 30, 50, 1.0, 3.0), BlockCost(True, 60, 20, 0, 1.0, 1.0)
    return Costs((below, trained, frozen), 10, 40, 0.5, 1000, 70, 0.25, micro_batches, 0)


def test_the_peak_is_the_worst_of_head_backward_and_step() -> None:
    whole = (False, False, False)
    # Kept by both blocks: 70 + 110; while the upper one goes backward, its output's gradient and 20 more pass.
    assert costs().peak(whole) == 1000 + 180 + 40
    # Recomputed, the upper block holds its states alone, and its 60 + 10 come back while it goes backward.
    assert costs().peak((False, False, True)) == 1000 + 120 + 10 + 20 + 70
    assert costs(micro_batches=4).peak(whole) == 1000 + 180 + 50 + 40


def test_recomputing_costs_a_forward_pass_a_micro_batch() -> None:
    assert costs().seconds((False, False, False)) == 3.0 + 4.0 + 0.5 + 0.25
    assert costs(4).seconds((False, True, False)) == 4 * (4.0 + 4.0 + 0.5) + 0.25


@given(st.lists(st.booleans(), min_size=3, max_size=3), st.integers(1, 3))
def test_no_forecast_is_below_what_lasts(recomputed: list[bool], micro_batches: int) -> None:
    made = costs(micro_batches)
    assert made.peak(recomputed) >= made.lasting_bytes + made.gradient_bytes + made.step_bytes
    assert made.seconds(recomputed) >= made.seconds([False] * 3)


@pytest.mark.slow
def test_kinds_of_blocks_are_measured_as_they_are() -> None:
    _, one = engine()
    found = measure(one, batch())
    assert [block.has_graph for block in found.blocks] == [False, True, True, True]
    assert [block.gradient_bytes > 0 for block in found.blocks] == [False, True, False, False]
    assert found.blocks[2] is found.blocks[3]
    # A block that trains keeps its linears' inputs; a frozen one needs none of them.
    assert found.blocks[1].kept_bytes > found.blocks[2].kept_bytes > 0
    assert found.states_bytes == 4 * 16 * 16 * 4


@pytest.mark.slow
@pytest.mark.parametrize("in_bf16", [False, True])
def test_the_training_is_bit_identical_with_preflight_and_with_recomputed_blocks(in_bf16: bool) -> None:
    made = []
    for count in (None, 0, 2, 3):
        model, one = engine(in_bf16=in_bf16)
        torch.manual_seed(5)
        if count is not None:
            measure(one, batch())
            assert sum(one.objective.decoder.recompute(count)) == count
        for _ in range(3):
            one.gradients(batch())
            one.step(1.0)
        made.append((torch.rand(3), {name: p.detach().clone() for name, p in model.named_parameters()}))
    for draw, weights in made[1:]:
        assert torch.equal(draw, made[0][0])
        assert all(torch.equal(weights[name], made[0][1][name]) for name in weights)


@pytest.mark.slow
def test_micro_batches_add_up_to_the_batch() -> None:
    made = []
    for micro_batch in (None, 1, 2):
        model, one = engine(micro_batch)
        loss = one.gradients(batch())
        made.append((loss, model.model.layers[1].mlp.up_proj.weight.grad))
    for loss, gradient in made[1:]:
        assert loss.labels == made[0][0].labels
        assert loss.nats == pytest.approx(made[0][0].nats, rel=1e-5)
        torch.testing.assert_close(gradient, made[0][1])


@pytest.mark.slow
def test_what_cannot_fit_is_refused_with_the_numbers() -> None:
    _, one = engine()
    with pytest.raises(
        BadInput, match=r"training would take \d+\.\d\d GiB with every block recomputed .* 0\.01 GiB"
    ) as caught:
        preflight(one, batch(), section(memory_gib=0.01))
    assert "raise train.memory_gib" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_forecast_says_memory_and_speed() -> None:
    _, one = engine()
    forecast = preflight(one, batch(), section())
    assert forecast.recomputed == 0 and forecast.with_graph == 3
    assert taken_bytes(one.device) <= forecast.peak_bytes <= available_bytes(one.device)
    assert forecast.text().startswith(f"expected memory {forecast.peak_bytes / GIB:.2f} GiB of ")
    assert forecast.tokens_per_second > 0
