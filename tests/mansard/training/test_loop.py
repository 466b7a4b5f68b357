"""The loop resumes bit for bit, and stops where numbers go bad without losing what was good."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mansard.errors import BadInput, MansardError
from mansard.specs.training import LearningRates, Train
from mansard.training.data import Mixture, Packed, as_batch
from mansard.training.engines import LocalEngine
from mansard.training.loop import Moment, Plan, run_loop
from mansard.training.optimizer import Group
from mansard.training.packing import pack
from mansard.training.state import Checkpoints, Cursor

pytestmark = pytest.mark.slow
SHAPE = {"vocabulary": 50, "hidden": 16, "intermediate": 32, "blocks": 2, "heads": 2, "max_tokens": 32}


def source(name: str) -> Packed:
    documents = [[2 + (i * j) % 40 for j in range(1, 30)] for i in range(1, 12)]
    return Packed(name, *pack(documents, 16, 0), bytes_per_token=3.0)


def plan(tokens: int = 6 * 64, checkpoint_every_steps: int = 2) -> Plan:
    rates = LearningRates(new_blocks=1e-2)
    train = Train(tokens=tokens, batch_sequences=4, learning_rates=rates, evaluate_every_steps=3,
                  checkpoint_every_steps=checkpoint_every_steps)  # fmt: skip
    return Plan.of(train, 16)


def engine(dtype: torch.dtype = torch.float32, rate: float = 1e-2) -> tuple[Any, LocalEngine]:
    from mansard.demo.base import untrained_model

    model = untrained_model(SHAPE, 0).to(dtype)
    return model, LocalEngine(model, [Group("base", rate, dict(model.named_parameters()))], 0.1, 1.0)


def run(
    work: Path, dtype: torch.dtype = torch.float32, rate: float = 1e-2, stop_at: int | None = None
) -> tuple[Cursor, dict[str, torch.Tensor]]:
    def report(moment: Moment) -> None:
        if moment.step == stop_at:
            raise KeyboardInterrupt

    model, one = engine(dtype, rate)
    mixture = Mixture([source("a"), source("b")], [0.5, 0.5], 4, 0)
    cursor = run_loop(one, mixture, [source("a")], plan(), Checkpoints(work), report)
    return cursor, {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_resumed_from_a_checkpoint_ends_bit_identical(tmp_path: Path, dtype: torch.dtype) -> None:
    whole_cursor, whole = run(tmp_path / "whole", dtype)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", dtype, stop_at=5)
    found = Checkpoints(tmp_path / "cut").read()
    assert found is not None and found[0].step == 4
    cursor, resumed = run(tmp_path / "cut", dtype)
    assert cursor == whole_cursor
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_checkpoint_holds_masters_and_optimizer_of_trained_tensors_only(tmp_path: Path) -> None:
    from mansard.demo.base import untrained_model

    model = untrained_model(SHAPE, 0).to(torch.bfloat16)
    trained = {n: p for n, p in model.named_parameters() if n.startswith("model.layers.1.")}
    one = LocalEngine(model, [Group("new_blocks", 1e-2, trained)], 0.0, 1.0)
    mixture = Mixture([source("a")], [1.0], 4, 0)
    run_loop(one, mixture, [source("a")], plan(), Checkpoints(tmp_path), lambda moment: None)
    found = Checkpoints(tmp_path).read()
    assert found is not None
    names = {f"{kind}/{name}" for kind in ("master", "exp_avg", "exp_avg_sq", "step") for name in trained}
    assert found[1].keys() == names | {"rng/cpu"}
    assert all(t.dtype == torch.float32 for n, t in found[1].items() if n.startswith("master/"))


def test_the_loss_falls_and_the_curve_holds_every_evaluation(tmp_path: Path) -> None:
    cursor, _ = run(tmp_path)
    assert [point["step"] for point in cursor.curve] == [0, 3, 6]
    assert [point["tokens"] for point in cursor.curve] == [0, 192, 384]
    assert cursor.curve[-1]["bits_per_byte"]["a"] < cursor.curve[0]["bits_per_byte"]["a"]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    model, one = engine()

    def report(moment: Moment) -> None:
        if moment.step == 5:
            with torch.no_grad():
                model.lm_head.weight[0, 0] = float("nan")

    mixture = Mixture([source("a")], [1.0], 4, 0)
    with pytest.raises(MansardError, match="training stopped after 5 steps: the loss is nan") as caught:
        run_loop(one, mixture, [source("a")], plan(), Checkpoints(tmp_path), report)
    assert "the checkpoint of step 4 is kept" in str(caught.value)
    assert "\n" not in str(caught.value)
    found = Checkpoints(tmp_path).read()
    assert found is not None and found[0].step == 4
    assert all(tensor.isfinite().all() for tensor in found[1].values())


def test_a_device_without_memory_left_stops_and_says_what_to_change(tmp_path: Path) -> None:
    class Full(LocalEngine):
        steps = 0

        def step(self, factor: float) -> float:
            self.steps += 1
            if self.steps == 4:
                raise torch.OutOfMemoryError("as CUDA says it")
            return super().step(factor)

    model, _ = engine()
    full = Full(model, [Group("base", 1e-2, dict(model.named_parameters()))], 0.1, 1.0)
    mixture = Mixture([source("a")], [1.0], 4, 0)
    with pytest.raises(MansardError, match="stopped after 3 steps: the device has no memory left") as caught:
        run_loop(full, mixture, [source("a")], plan(), Checkpoints(tmp_path), lambda moment: None)
    assert "the checkpoint of step 2 is kept" in str(caught.value) and "micro_batch_sequences" in str(caught.value)


def test_rates_that_blow_the_weights_up_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(MansardError, match="training stopped after"):
        run(tmp_path, rate=1e30)


def test_a_budget_below_one_batch_is_refused() -> None:
    with pytest.raises(BadInput, match=r"train\.tokens 63 is below one batch of 64 tokens"):
        plan(tokens=63)
    assert plan(tokens=130).tokens == 128


def test_only_real_tokens_are_predicted(tmp_path: Path) -> None:
    _, one = engine()
    tokens, positions = pack([[5, 6, 7], [8, 9]], 7, 0)
    assert one.evaluate([as_batch(tokens, positions)]).labels == 5
