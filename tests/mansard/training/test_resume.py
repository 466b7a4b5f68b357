"""Training goes on from any checkpoint bit for bit, takes no other run's, and small rates in bf16 still move."""

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load

from mansard.errors import BadInput
from mansard.models.storeys import newest_tensors
from mansard.records import SnapshotId
from mansard.store.store import Store
from mansard.training import stage
from mansard.worker import Channel, StageContext
from tests.mansard.training.conftest import BATCH_ROWS, ROW_TOKENS, slice_

pytestmark = pytest.mark.slow

Fill = Callable[[Store], dict[str, SnapshotId]]
FILE = "checkpoint.safetensors"
DEADLINE_SECONDS = 60.0


class Heard(io.StringIO):
    """Calls `told` with the steps done after each progress message of a step."""

    def __init__(self, told: Callable[[int], None]) -> None:
        super().__init__()
        self._told = told

    def write(self, text: str) -> int:
        steps, rest = divmod(int(json.loads(text)["progress"]["done"]), ROW_TOKENS * BATCH_ROWS)
        if steps and not rest:
            self._told(steps)
        return len(text)


def run(
    store: Store, inputs: dict[str, SnapshotId], spec: dict[str, Any], recipe: str, told: Callable[[int], None]
) -> SnapshotId:
    context = StageContext(store, recipe, inputs, spec, {}, store.work(recipe), Channel(Heard(told)))
    made: SnapshotId = stage.run(context)
    return made


def nothing(step: int) -> None:
    pass


def step_of(path: Path) -> int:
    with safe_open(str(path), framework="pt") as file:
        return int(json.loads(file.metadata()["cursor"])["step"])


def keeper(work: Path, steps: int, kept: dict[int, bytes]) -> Callable[[int], None]:
    """Keeps the checkpoint of every step as soon as it is written."""

    def keep(step: int) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while step < steps and not ((work / FILE).exists() and step_of(work / FILE) == step):
            assert time.monotonic() < deadline, f"no checkpoint of step {step}"
            time.sleep(0.01)
        if step < steps:
            kept[step] = (work / FILE).read_bytes()

    return keep


def test_training_resumed_from_any_checkpoint_ends_in_the_same_snapshot(store: Store, fill: Fill) -> None:
    inputs, spec, recipe, kept = fill(store), slice_(6), "a" * 64, dict[int, bytes]()
    whole = run(store, inputs, spec, recipe, keeper(store.work(recipe), 6, kept))
    assert sorted(kept) == [1, 2, 3, 4, 5]
    for step, checkpoint in kept.items():
        store.discard_work(recipe)
        (store.work(recipe) / FILE).write_bytes(checkpoint)
        taken: list[int] = []
        assert run(store, inputs, spec, recipe, taken.append) == whole, f"resumed from step {step}"
        assert min(taken) == step + 1


def test_a_checkpoint_of_another_base_spec_or_data_is_refused_and_kept(store: Store, fill: Fill) -> None:
    inputs, kept = fill(store), dict[int, bytes]()
    run(store, inputs, slice_(2), "a" * 64, keeper(store.work("a" * 64), 2, kept))
    path = store.work("b" * 64) / FILE
    path.write_bytes(kept[1])
    with pytest.raises(BadInput, match="a checkpoint of another base, spec or data") as refused:
        run(store, inputs, slice_(2), "b" * 64, nothing)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    assert path.read_bytes() == kept[1]


@pytest.mark.parametrize("harm", [lambda raw: raw[: len(raw) // 2], lambda raw: b"x" * 100, lambda raw: b""])
def test_a_damaged_checkpoint_is_refused_in_one_line_and_kept(
    store: Store, fill: Fill, harm: Callable[[bytes], bytes]
) -> None:
    inputs, kept, recipe = fill(store), dict[int, bytes](), "a" * 64
    run(store, inputs, slice_(2), recipe, keeper(store.work(recipe), 2, kept))
    path = store.work(recipe) / FILE
    path.write_bytes(harm(kept[1]))
    with pytest.raises(BadInput, match="damaged") as refused:
        run(store, inputs, slice_(2), recipe, nothing)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    assert path.read_bytes() == harm(kept[1])


def test_bf16_at_a_rate_of_one_millionth_still_moves_every_trained_tensor(store: Store, fill: Fill) -> None:
    inputs, kept, recipe = fill(store), dict[int, bytes](), "a" * 64
    spec = slice_(40, precision="bf16", learning_rates={"new_blocks": 1e-6}, evaluate_every_steps=100)
    made = run(store, inputs, spec, recipe, keeper(store.work(recipe), 40, kept))
    before = load_tensors(store, inputs["expansion"])
    trained = load(store.read_file(made, "trained.safetensors"))
    masters = load(kept[39])
    names = newest_tensors(store, inputs["expansion"])
    assert trained.keys() == set(names)
    for name in names:
        assert not torch.equal(masters[f"master/{name}"], before[name].float()), f"{name} did not move in float32"
        if before[name].ndim == 2:  # a norm near 1 needs more than these steps to reach the next number of bf16
            assert not torch.equal(trained[name], before[name]), f"{name} did not move in bf16"


def load_tensors(store: Store, model: SnapshotId) -> dict[str, torch.Tensor]:
    return load(store.read_file(model, "model.safetensors"))
