"""What an average keeps of a training's gain, on a very small model that learned something."""

import json
import math
from collections.abc import Callable
from io import StringIO
from typing import Any

import pytest

from mansard.errors import BadInput
from mansard.models.average import average
from mansard.models.fuse import fuse
from mansard.records import SnapshotId
from mansard.store.store import Store
from mansard.training import kept_gain_stage, stage
from mansard.training.kept_gain_stage import _gain, _guard
from mansard.worker import Channel, StageContext
from tests.mansard.training.conftest import jsonl, texts

pytestmark = pytest.mark.slow

WISH = {"weight": 0.5, "sequence_tokens": 32, "gains": ["data.code.held_out"], "guards": ["suite.prose-bits"]}


class Spoken(StringIO):
    """What a stage tells its parent."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[str, float] = {}

    def write(self, text: str) -> int:
        self.metrics |= json.loads(text)["progress"]["metrics"]
        return len(text)


def run(
    store: Store, inputs: dict[str, SnapshotId], wish: dict[str, Any], spoken: Spoken | None = None
) -> dict[str, Any]:
    context = StageContext(store, "b" * 64, inputs, wish, {}, store.work("b" * 64), Channel(spoken or Spoken()))
    found: dict[str, Any] = json.loads(store.read_file(kept_gain_stage.run(context), "fusion.json"))
    return found


@pytest.fixture
def compared(store: Store, base_folder: Any, fill: Callable[[Store], dict[str, SnapshotId]]) -> dict[str, SnapshotId]:
    """Base, expansion trained on code, a half-and-half average, and texts."""
    inputs = fill(store)
    source = {"name": "code", "train": "t", "held_out": "h", "weight": 1.0, "is_domain": True}
    rates = {"new_blocks": 1e-2}
    wish = {
        "data": {"sources": [source], "sequence_tokens": 32, "min_domain_fraction": 0.3, "seed": 0},
        "train": {"tokens": 30 * 4 * 32, "batch_sequences": 4, "learning_rates": rates, "precision": "fp32"},
    }
    context = StageContext(store, "a" * 64, inputs, wish, {}, store.work("a" * 64), Channel(Spoken()))
    expanded = fuse(store, inputs["expansion"], stage.run(context))
    return {
        "base": store.snapshot(base_folder),
        "expanded": expanded,
        "averaged": average(store, expanded, 0.5),
        "data.code.held_out": store.put_files({"data.jsonl": jsonl(texts("code", 10))}),
        "suite.prose-bits": store.put_files({"items.jsonl": jsonl(texts("prose", 10))}),
    }


def test_the_record_compares_the_three_models_on_each_text(store: Store, compared: dict[str, SnapshotId]) -> None:
    spoken = Spoken()
    found = run(store, compared, WISH, spoken)
    code, prose = found["texts"]["data.code.held_out"], found["texts"]["suite.prose-bits"]
    assert code["expanded"] < code["base"]  # it learned
    assert code["averaged"] not in (code["base"], code["expanded"])
    assert code["kept_share"] == pytest.approx((code["averaged"] - code["base"]) / (code["expanded"] - code["base"]))
    assert prose["loss"] == pytest.approx(prose["averaged"] - prose["base"])
    assert spoken.metrics["kept_share_data.code.held_out"] == code["kept_share"]
    assert spoken.metrics["guard_loss_suite.prose-bits"] == prose["loss"]
    changed = found["changed_base_tensors"]
    assert {name.split(".")[2] for name in changed} == {"0", "1"}
    assert "model.layers.0.self_attn.o_proj.weight" in changed
    assert run(store, compared, WISH) == found


def test_the_expanded_model_keeps_all_and_the_base_nothing(store: Store, compared: dict[str, SnapshotId]) -> None:
    from mansard.training.kept_gain_stage import _measured, _texts

    context = StageContext(store, "c" * 64, compared, WISH, {}, store.work("c" * 64), Channel(Spoken()))
    names = _texts(context, WISH["gains"])
    bits = {who: _measured(context, who, names)["data.code.held_out"] for who in ("base", "expanded")}
    assert _gain({**bits, "averaged": bits["expanded"]})["kept_share"] == 1.0
    assert _gain({**bits, "averaged": bits["base"]})["kept_share"] == 0.0
    assert _gain({"base": 2.0, "expanded": 2.0, "averaged": 2.5})["kept_share"] is None
    assert _guard({"base": 2.0, "expanded": 2.0, "averaged": 2.5})["loss"] == 0.5


def test_losses_are_told_in_bits_per_byte(store: Store, compared: dict[str, SnapshotId]) -> None:
    from mansard.models.loading import load_model, load_tokenizer
    from mansard.training.data import pack_texts
    from mansard.training.engines import ModelEngine

    tree = store.materialize(compared["base"])
    text = pack_texts("data.code.held_out", texts("code", 10), load_tokenizer(tree), WISH["sequence_tokens"], 0)
    loss = ModelEngine(load_model(tree, None), None).evaluate([text.batch(range(len(text)))])
    found = run(store, compared, WISH)["texts"]["data.code.held_out"]["base"]
    assert text.bytes_per_token > 1.05
    assert found * text.bytes_per_token * math.log(2) == pytest.approx(loss.nats / loss.labels, rel=1e-4)


def test_a_text_below_a_row_is_named_and_left_out(store: Store, compared: dict[str, SnapshotId]) -> None:
    short = store.put_files({"items.jsonl": jsonl(["one word"])})
    found = run(store, {**compared, "suite.short": short}, {**WISH, "guards": ["suite.short"]})
    assert found["too_short"] == ["suite.short"]
    assert list(found["texts"]) == ["data.code.held_out"]


def test_another_models_base_is_refused(store: Store, compared: dict[str, SnapshotId]) -> None:
    with pytest.raises(BadInput, match="base and averaged: other tensors in each"):
        run(store, {**compared, "base": compared["expanded"]}, WISH)
