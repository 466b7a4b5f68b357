"""Branches that read several layers of one base: captured, learned, computed by the Hugging Face class."""

import importlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mansard.composition.description import BranchDescription, described
from mansard.composition.shape import BranchShape, shape_of
from mansard.errors import BadInput
from mansard.specs.carry_on import Branch as BranchSpec
from mansard.worker import Channel, StageContext
from tests.mansard.carry_on.conftest import DATA, ROWS, SERVE, Filled, ServeStates

pytestmark = pytest.mark.slow
TAPS = [1]
"""Of a base of two layers: its only one before the last."""
TRAIN = {"tokens": 1280, "batch_sequences": 4, "learning_rate": 3e-3, "precision": "fp32"}


def tapped_branch(seed: int = 0) -> Any:
    import torch

    from mansard.carry_on.branch import Branch

    branch = Branch(shape_of(128, 64, 2, TAPS))
    branch.start(seed)
    with torch.no_grad():
        branch.output.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
        branch.tap_weights.copy_(torch.tensor([0.2, 1.4]))
    return branch


def in_work(
    filled: Filled, inputs: dict[str, str], spec: dict[str, Any], where: dict[str, Any], work: Path
) -> StageContext:
    work.mkdir(exist_ok=True)
    return StageContext(filled.store, "0" * 64, inputs, spec, where, work, Channel(io.StringIO()))


def captured(filled: Filled, node: Any, work: Path, scheme: str, taps: list[int]) -> str:
    from mansard.carry_on.capture_stage import run

    spec = {"data": DATA, "scheme": scheme, "rows": ROWS, "serve": SERVE, "engine": {}, "taps": taps}
    where = {"nodes": [{"endpoint": node.endpoint, "served_name": "base"}]}
    return run(in_work(filled, filled.inputs, spec, where, work))


def trained(filled: Filled, capture: str, work: Path, taps: list[int]) -> str:
    from mansard.carry_on.train_stage import run

    spec = {"data": DATA, "branch": {"width": 64, "taps": taps}, "train": TRAIN, "alphas": [1.0]}
    return run(in_work(filled, {"artifact": filled.base, "capture": capture}, spec, {}, work))


def test_a_branch_without_taps_is_described_as_before_taps_existed() -> None:
    told = json.loads(BranchDescription("a" * 64, shape_of(128, 64, 2), 1.0).metadata()["carry_on"])
    assert "taps" not in told["shape"] and "others" not in told["shape"]
    tapped = BranchDescription("a" * 64, shape_of(128, 64, 2, TAPS), 1.0)
    assert described(tapped.metadata(), "it") == tapped


def test_the_shape_counts_the_parameters_of_a_tapped_branch() -> None:
    branch = tapped_branch()
    assert sum(p.numel() for p in branch.parameters()) == branch.shape.parameters


def test_a_projection_for_each_tap_is_counted_told_and_learns() -> None:
    import torch

    from mansard.carry_on.branch import Branch, packed_mask

    shape = shape_of(128, 64, 2, TAPS, tap_projections=True)
    assert BranchShape.from_json(shape.as_json()) == shape
    branch = Branch(shape)
    branch.start(0)
    assert sum(p.numel() for p in branch.parameters()) == shape.parameters
    with torch.no_grad():
        branch.output.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(5)[None]
    branch(torch.randn(1, 5, 256), positions, packed_mask(positions)).square().sum().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in branch.parameters())


def test_taps_are_summed_by_the_softmax_of_their_weights() -> None:
    import torch

    from mansard.carry_on.branch import Branch

    shape = shape_of(64, 64, 1, taps=(1, 2))
    (branch := Branch(shape)).start(0)
    x, one, two = torch.randn(3, 1, 5, 64)
    with torch.no_grad():
        branch.tap_weights.copy_(torch.tensor([1.0, 6.0, 3.0]).log())
        normed = [torch.nn.functional.rms_norm(part, (64,), eps=shape.norm_epsilon) for part in (x, one, two)]
        wanted = (0.1 * normed[0] + 0.6 * normed[1] + 0.3 * normed[2]) @ branch.project.T
        torch.testing.assert_close(branch.read(torch.cat([x, one, two], dim=-1)), wanted)


def test_taps_out_of_order_are_refused() -> None:
    with pytest.raises(ValidationError, match="ascending order"):
        BranchSpec(width=64, taps=[3, 1])


def test_the_model_reads_the_layers_that_transformers_calls_hidden_states(base_model: Any) -> None:
    import torch

    from mansard.carry_on.branch import packed_mask
    from mansard.carry_on.model import CarryOnForCausalLM

    branch, tokens = tapped_branch(), torch.arange(3, 40)[None]
    model = CarryOnForCausalLM(base_model, branch, 0.7).eval()
    positions = torch.arange(37)[None]
    base_model.model(input_ids=tokens, output_hidden_states=True)  # transformers leaves a hook of its own
    hooks = base_model.model.layers[0]._forward_hooks
    hooks_before = len(hooks)
    with torch.no_grad():
        given = base_model.model(input_ids=tokens, output_hidden_states=True)
        states = torch.cat([given.last_hidden_state, given.hidden_states[1]], dim=-1)
        y = given.last_hidden_state + 0.7 * branch(states, positions, packed_mask(positions))
        torch.testing.assert_close(model(tokens).logits, base_model.lm_head(y), atol=1e-5, rtol=1e-5)
        model.alpha = 0.0
        assert torch.equal(model(tokens).logits, base_model(tokens).logits)
    assert len(hooks) == hooks_before


def test_generation_of_a_tapped_branch_with_its_cache_is_generation_without(base_model: Any) -> None:
    import torch

    from mansard.carry_on.model import CarryOnForCausalLM

    model = CarryOnForCausalLM(base_model, tapped_branch(), 1.0).eval()
    whole = prompt = torch.tensor([[5, 9, 33, 7], [8, 8, 21, 4]])
    cached = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        for _ in range(12):
            whole = torch.cat([whole, model(whole).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(cached, whole)


@pytest.mark.parametrize("scheme", ["bf16", "fp8", "int8"])
def test_states_of_several_layers_come_back_with_a_scale_each(scheme: Any) -> None:
    import torch

    from mansard.carry_on.wire import decode, encode

    states = torch.randn(20, 96) * torch.tensor([1.0, 1000.0, 0.01]).repeat_interleave(32)
    back = decode(encode(states, [0], scheme, 3), torch.tensor([0]), torch.float32)
    for part, wanted in zip(back.split(32, dim=-1), states.split(32, dim=-1), strict=True):
        assert float((part - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.parametrize("scheme", ["bf16", "fp8"])
def test_a_tapped_branch_learns_from_captured_states(
    scheme: str, filled: Filled, serve_states: ServeStates, base_model: Any, tmp_path: Path
) -> None:
    import torch

    from mansard.carry_on.branch_file import load_branch
    from mansard.carry_on.cached import open_cache
    from mansard.carry_on.model import tapped_states
    from mansard.carry_on.wire import decode

    capture = captured(filled, serve_states(taps=(1,)), tmp_path / "c", scheme, TAPS)
    cache = open_cache(filled.store, capture)
    batch = next(b for b in (t.batch([0]) for t in cache.texts("train")) if int((b.positions_BT == 0).sum()) == 1)
    coded, rows = cache.of(batch)
    found = decode(coded, torch.tensor(rows), torch.float32)
    with torch.no_grad():
        wanted = tapped_states(base_model.model, TAPS, input_ids=batch.tokens_BT)[0]
    assert float((found - wanted).norm() / wanted.norm()) < 0.04
    made = trained(filled, capture, tmp_path / "t", TAPS)
    report = json.loads(filled.store.read_file(made, "branch.json"))
    base, whole = (point["bits_per_byte"]["code"] for point in report["alphas"])
    assert whole < base
    filled.store.restore(made, tmp_path / "branch")
    branch, description = load_branch(tmp_path / "branch" / "branch.safetensors", filled.base, torch.float32)
    assert description.shape.taps == (1,)
    assert float(branch.tap_weights.detach().softmax(0).sum()) == pytest.approx(1.0)
    assert not torch.equal(branch.tap_norms[1], torch.ones(128))  # it learned


def test_a_node_without_the_taps_a_layer_that_is_none_and_another_capture_are_refused(
    filled: Filled, serve_states: ServeStates, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=r"start nodes with --hf-overrides .*CarryOnTapsLlamaForCausalLM"):
        captured(filled, serve_states(), tmp_path / "a", "bf16", TAPS)
    with pytest.raises(BadInput, match="taps are from 1 to 1"):
        captured(filled, serve_states(), tmp_path / "b", "bf16", [2])
    plain = captured(filled, serve_states(), tmp_path / "c", "bf16", [])
    with pytest.raises(BadInput, match="capture again"):
        trained(filled, plain, tmp_path / "t", TAPS)


def test_a_node_with_as_many_other_taps_or_one_that_does_not_say_them_is_refused(
    filled: Filled, serve_states: ServeStates, tmp_path: Path
) -> None:
    other, silent = serve_states(taps=(2,)), serve_states(taps=(1,))
    silent.tells_taps = False
    with pytest.raises(BadInput, match=r"gives states after layers \[2\], branch.taps are \[1\]; start") as no:
        captured(filled, other, tmp_path / "a", "bf16", TAPS)
    assert "\n" not in str(no.value)
    with pytest.raises(BadInput, match=r"does not say which layers it gives, branch.taps are \[1\]"):
        captured(filled, silent, tmp_path / "b", "bf16", TAPS)


def test_the_small_form_of_the_benchmark_compares_taps_and_mixture_with_the_plain_form(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    benchmark = importlib.import_module("carry_on_taps")
    assert benchmark.main(["--device", "cpu", "--small"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    parameters = [form["parameters"] for form in told["forms"].values()]
    assert max(parameters) <= benchmark.SMALL.parameters < 1.4 * min(parameters)  # widths have a grain
    assert set(told["gains"]) == {"even", "projected", "mixture"}
    before = told["base"]["bits_per_byte"]["first"]["code"]
    assert all(form["bits_per_byte"]["mean"] < before for form in told["forms"].values())
    assert sum(told["forms"]["even"]["shares"]) == pytest.approx(1.0, abs=1e-3)
    assert benchmark.verdict({"low": -0.2, "high": -0.1}) == "refuted"
