"""Branches that read several bases: refused where tokens differ, captured base by base, learned, computed."""

import json
from pathlib import Path
from typing import Any

import pytest

from mansard.composition.compose import compose
from mansard.composition.mixture import check_tokenizers
from mansard.composition.shape import shape_of
from mansard.errors import BadInput
from tests.mansard.carry_on.conftest import DATA, SHAPE, Filled, ServeStates, jsonl, texts
from tests.mansard.carry_on.test_stages import captured, context

pytestmark = pytest.mark.slow
WIDTH = 64
"""Of the second base: other than the first's."""


@pytest.fixture(scope="module")
def second_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another base with the first one's tokenizer, narrower and deeper."""
    from mansard.demo.base import save_base, train_tokenizer, untrained_model

    folder = tmp_path_factory.mktemp("second")
    shape = {**SHAPE, "hidden": WIDTH, "heads": 1, "blocks": 3}
    save_base(untrained_model(shape, 5), train_tokenizer(texts("word", 20), SHAPE["vocabulary"], 64), folder)
    return folder


@pytest.fixture(scope="module")
def second_model(second_folder: Path) -> Any:
    import torch

    from mansard.models.loading import load_model

    return load_model(second_folder, torch.float32)


def mixed_branch() -> Any:
    import torch

    from mansard.carry_on.branch import Branch

    branch = Branch(shape_of(128, 64, 2, [1], [WIDTH]))
    branch.start(0)
    with torch.no_grad():
        branch.output.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    return branch


def test_the_shape_counts_the_parameters_of_a_mixture() -> None:
    branch = mixed_branch()
    assert sum(p.numel() for p in branch.parameters()) == branch.shape.parameters


def test_a_mixture_generates_with_every_bases_cache_what_it_computes_without(
    base_model: Any, second_model: Any
) -> None:
    import torch

    from mansard.carry_on.model import CarryOnForCausalLM

    model = CarryOnForCausalLM(base_model, mixed_branch(), 1.0, [second_model]).eval()
    whole = prompt = torch.tensor([[5, 9, 33, 7], [8, 8, 21, 4]])
    cached = model.generate(prompt, max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        for _ in range(10):
            whole = torch.cat([whole, model(whole).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(cached, whole)
        changed = model(whole).logits
        second_model.model.norm.weight.mul_(0.5)
        assert not torch.equal(model(whole).logits, changed)  # the second base is really read
        second_model.model.norm.weight.mul_(2.0)
        model.alpha = 0.0
        assert torch.equal(model(whole).logits, base_model(whole).logits)
    with pytest.raises(BadInput, match=r"beside bases of widths \[64\]; given: \[\]"):
        CarryOnForCausalLM(base_model, mixed_branch(), 1.0)


@pytest.mark.parametrize("scheme", ["bf16", "fp8"])
def test_a_mixture_learns_from_both_bases_captures_and_names_its_bases(
    scheme: str, filled: Filled, serve_states: ServeStates, second_folder: Path, second_model: Any, tmp_path: Path
) -> None:
    import torch

    from mansard.carry_on.cached import AlignedStates, open_cache
    from mansard.carry_on.model import load_carry_on, tapped_states
    from mansard.carry_on.train_stage import run
    from mansard.carry_on.wire import decode

    store, second = filled.store, filled.store.snapshot(second_folder)
    first_capture = captured(filled, serve_states, tmp_path / "a", scheme)
    beside = Filled(store, second, {**filled.inputs, "artifact": second})
    second_capture = captured(beside, lambda: serve_states(model=second_model), tmp_path / "b", scheme)
    caches = tuple(open_cache(store, c) for c in (first_capture, second_capture))
    batch = caches[0].texts("held_out")[1].batch([0])
    coded, rows = AlignedStates(caches).of(batch)
    length = int((batch.positions_BT[0, 1:] == 0).nonzero()[0]) + 1 if (batch.positions_BT[0, 1:] == 0).any() else 32
    found = decode(coded, torch.tensor(rows), torch.float32)[:length, 128:]
    with torch.no_grad():
        wanted = tapped_states(second_model.model, (), input_ids=batch.tokens_BT[:, :length])[0]
    assert float((found - wanted).norm() / wanted.norm()) < 0.05

    train = {"tokens": 1280, "batch_sequences": 4, "learning_rate": 3e-3, "precision": "fp32"}
    spec = {"data": DATA, "branch": {"width": 64}, "train": train, "alphas": [1.0]}
    inputs = {
        "artifact": filled.base, "capture": first_capture, "artifact.1": second, "capture.1": second_capture,
    }  # fmt: skip
    made = run(context(filled, inputs, spec, {}, tmp_path / "t"))
    base, whole = (p["bits_per_byte"] for p in json.loads(store.read_file(made, "branch.json"))["alphas"])
    assert whole["code"] < base["code"]
    trees = {}
    for name, snapshot in (("branch", made), ("first", filled.base), ("second", second)):
        store.restore(snapshot, tmp_path / name)
        trees[name] = tmp_path / name
    file = trees["branch"] / "branch.safetensors"
    model = load_carry_on(trees["first"], filled.base, file, 1.0, torch.float32, {second: trees["second"]})
    assert model(batch.tokens_BT).logits.shape == (1, 32, SHAPE["vocabulary"])
    with pytest.raises(BadInput, match=f"reads these bases beside the first: {second[:12]}; given: none"):
        load_carry_on(trees["first"], filled.base, file, 1.0)
    with pytest.raises(BadInput, match="a branch on 2 bases is not served by vLLM yet"):
        compose(store, filled.base, made, 1.0)


def test_bases_of_different_tokenizers_are_refused_and_how_one_was_last_called_is_no_difference(
    filled: Filled, second_folder: Path, tmp_path: Path
) -> None:
    import shutil

    def changed(name: str, **values: Any) -> str:
        folder = tmp_path / name
        shutil.copytree(second_folder, folder)
        told = json.loads((folder / "tokenizer.json").read_bytes())
        (folder / "tokenizer.json").write_text(json.dumps(told | values))
        return filled.store.snapshot(folder)

    truncating = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    check_tokenizers(filled.store, [filled.base, changed("same", truncation=truncating)])
    other = changed("other", normalizer={"type": "NFC"})
    with pytest.raises(BadInput, match="take bases of one tokenizer"):
        check_tokenizers(filled.store, [filled.base, other])
    none = filled.store.put_files({"data.jsonl": jsonl(["x"])})
    with pytest.raises(BadInput, match=r"no tokenizer\.json"):
        check_tokenizers(filled.store, [filled.base, none])
