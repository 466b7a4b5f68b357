"""What blocks are worth, and the storey that stands where they are worth least; on very small real models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mansard.errors import BadInput
from mansard.models.families import FAMILIES, family_of
from mansard.models.model_files import model_config
from mansard.models.storeys import NewBlock, read_expansion
from mansard.store.store import Store

pytestmark = pytest.mark.slow

MakeFamily = Callable[..., Path]
MakeContext = Callable[..., Any]
PROBE = {"rows": 5, "tokens": 24, "seed": 0}
SILENT = 1


def general_text(store: Store, lines: int = 40) -> str:
    rows = [{"text": " ".join(f"word{(i * 7 + j) % 23}" for j in range(20)), "file": "a"} for i in range(lines)]
    return store.put_files({"data.jsonl": "".join(json.dumps(r) + "\n" for r in rows).encode()})


def with_silent_block(folder: Path, target: Path) -> Path:
    """The model of `folder`, the last factors of whose block SILENT have the values that let it add nothing."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    family = family_of(json.loads((target / "config.json").read_text()))
    tensors = load_file(target / "model.safetensors")
    for name, tensor in tensors.items():
        block, inner = family.split(name) or (None, "")
        value = family.silent_value(inner)
        if block == SILENT and value is not None:
            tensor.fill_(value)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def measure(make_context: MakeContext, inputs: dict[str, str], probe: dict[str, int] = PROBE) -> str:
    from mansard.models import importance_stage

    return importance_stage.run(make_context(inputs, probe))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_silent_block_is_worth_nothing_and_the_least_worth_is_copied(
    make_context: MakeContext, make_family: MakeFamily, tmp_path: Path, model_type: str
) -> None:
    from mansard.models import expand_stage

    store: Store = make_context({}, {}).store
    model = store.snapshot(with_silent_block(make_family(model_type), tmp_path / "model"))
    made = measure(make_context, {"model": model, "data.prose.train": general_text(store)})
    record = json.loads(store.read_file(made, "importance.json"))
    assert record["gains"][SILENT] == 0.0
    assert all(gain != 0.0 for block, gain in enumerate(record["gains"]) if block != SILENT)
    assert record["probe"] == {**PROBE, "kernel": "cpu"}
    wish = {"blocks": 1, "positions": "importance"}
    order = sorted(range(3), key=lambda b: record["gains"][b])
    expansion = expand_stage.run(make_context({"model": model, "importance": made}, wish))
    assert read_expansion(store, expansion).new_blocks == (NewBlock(order[0] + 1, order[0]),)


def test_a_gain_is_the_loss_of_the_model_without_the_block(make_context: MakeContext, make_family: MakeFamily) -> None:
    """Against a model from which transformers itself drops the block; the rows span more than one batch."""
    import torch

    from mansard.models.importance_stage import _rows
    from mansard.models.loading import load_model
    from mansard.specs.surgery import Probe

    store: Store = make_context({}, {}).store
    folder = make_family("llama")
    texts = {"data.prose.train": general_text(store), "data.law.train": general_text(store, 30)}
    inputs = {"model": store.snapshot(folder), **texts}
    context = make_context(inputs, PROBE)
    record = json.loads(store.read_file(measure(make_context, inputs), "importance.json"))
    ids_BT = _rows(context, Probe.model_validate(PROBE), folder)
    assert ids_BT.shape == (2 * PROBE["rows"], PROBE["tokens"]) and record["probe"]["rows"] == 2 * PROBE["rows"]
    whole = load_model(folder, None)
    with torch.inference_mode():
        assert record["loss"] == pytest.approx(float(whole(input_ids=ids_BT, labels=ids_BT).loss), rel=1e-5)
        for block, gain in enumerate(record["gains"]):
            model = load_model(folder, None)
            del model.get_decoder().layers[block]
            without = float(model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss)
            assert without - record["loss"] == pytest.approx(gain, abs=2e-5)


def test_it_is_the_same_again_and_another_seed_asks_other_text(
    make_context: MakeContext, make_family: MakeFamily
) -> None:
    store: Store = make_context({}, {}).store
    inputs = {"model": store.snapshot(make_family("llama")), "data.prose.train": general_text(store)}
    made = measure(make_context, inputs)
    assert measure(make_context, inputs) == made
    assert measure(make_context, inputs, {**PROBE, "seed": 1}) != made


def test_what_cannot_be_weighed_is_refused(make_context: MakeContext, make_family: MakeFamily) -> None:
    from mansard.models import expand_stage

    store: Store = make_context({}, {}).store
    model, text = store.snapshot(make_family("llama")), general_text(store)
    with pytest.raises(BadInput, match=r"add to data\.sources one with is_domain: false"):
        measure(make_context, {"model": model})
    with pytest.raises(BadInput, match=r"give more text or lower expand\.probe\.rows or expand\.probe\.tokens"):
        measure(make_context, {"model": model, "data.prose.train": text}, {**PROBE, "rows": 4000})
    with pytest.raises(BadInput, match=r"expand\.probe\.tokens is 129, but the model takes at most 128"):
        measure(make_context, {"model": model, "data.prose.train": text}, {**PROBE, "tokens": 129})
    wish = {"blocks": 1, "positions": "importance"}
    with pytest.raises(BadInput, match="no importance was measured"):
        expand_stage.run(make_context({"model": model}, wish))
    with pytest.raises(BadInput, match="no gains in it"):
        empty = store.put_files({"importance.json": b"{}"})
        expand_stage.run(make_context({"model": model, "importance": empty}, wish))
    assert model_config(store, model)["num_hidden_layers"] == 3
