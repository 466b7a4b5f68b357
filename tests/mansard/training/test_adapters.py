"""Adapters train in the new blocks alone, and what is fused is what they made of the weights."""

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load
from torch import nn

import mansard
from mansard.errors import BadInput, StageFailed
from mansard.models import fuse_stage
from mansard.models.expand import apply, plan
from mansard.models.loading import load_model
from mansard.models.model_files import model_config
from mansard.models.storeys import newest_tensors
from mansard.records import SnapshotId
from mansard.specs.surgery import Expand
from mansard.specs.training import Adapter, Train
from mansard.store.store import Store
from mansard.training import adapters, stage
from mansard.training.blocks import checkpoint_names
from mansard.training.four_bit_linear import PARTS, FourBitLinear
from mansard.training.linear_product import Bf16Linear
from mansard.training.ranks import check_ranks
from mansard.training.state import Checkpoints
from mansard.worker import Channel, StageContext
from tests.mansard.models.conftest import MakeFamily, make_family  # noqa: F401 - a fixture
from tests.mansard.training import conftest
from tests.mansard.training.conftest import jsonl, texts, tokenized

pytestmark = pytest.mark.slow

Fill = Callable[[Store], dict[str, SnapshotId]]
ROW_TOKENS, BATCH_ROWS = 32, 4
METHODS = ("lora", "dora", "qlora")


def adapter(method: str, **others: Any) -> dict[str, Any]:
    return {"method": method, "rank": 4, "alpha": 8.0, "modules": None, **others}


def slice_(steps: int, **train: Any) -> dict[str, Any]:
    return conftest.slice_(steps, **{"evaluate_every_steps": steps, **train})


def section(**train: Any) -> Train:
    return Train.model_validate(slice_(1, **train)["train"])


def expanded(store: Store, folder: Path) -> dict[str, SnapshotId]:
    base = store.snapshot(folder)
    inputs = {"expansion": apply(store, base, plan(model_config(store, base), Expand(blocks=2, positions=[0, 1])))}
    for name in ("code", "prose"):
        for part, found in (("train", texts(name, 30)), ("held_out", texts(name.upper(), 10))):
            inputs[f"data.{name}.{part}"] = tokenized(store, base, f"data.{name}.{part}", jsonl(found), ROW_TOKENS)
    return inputs


def context(store: Store, inputs: dict[str, SnapshotId], spec: dict[str, Any], recipe: str = "a" * 64) -> StageContext:
    return StageContext(store, recipe, inputs, spec, {}, store.work(recipe), Channel(StringIO()))


def report_of(store: Store, made: SnapshotId) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(store.read_file(made, "training.json"))
    return report


def fused(store: Store, inputs: dict[str, SnapshotId], trained: SnapshotId) -> SnapshotId:
    asked = {"expansion": inputs["expansion"], "trained": trained}
    made: SnapshotId = fuse_stage.run(context(store, asked, {"method": "residual"}, "f" * 64))
    return made


def weights(store: Store, model: SnapshotId) -> dict[str, torch.Tensor]:
    return {n: t.detach() for n, t in load_model(store.materialize(model), None).state_dict().items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_a_storey_of_adapters_is_trained_and_fused(
    store: Store, make_family: MakeFamily, family: str, method: str  # noqa: F811 - the fixture
) -> None:
    inputs = expanded(store, make_family(family))
    made = stage.run(context(store, inputs, slice_(12, adapter=adapter(method), max_forward_kl=1.0)))
    report, trained = report_of(store, made), load(store.read_file(made, "trained.safetensors"))
    assert trained.keys() == set(newest_tensors(store, inputs["expansion"]))
    assert report["changed_base_tensors"] == []
    assert report["curve"][-1]["bits_per_byte"]["code"] < report["curve"][0]["bits_per_byte"]["code"]
    # What the trainer computed is what the checkpoint computes; qlora's base has 4 bits less than the checkpoint's.
    assert report["forward_kl"] < (0.5 if method == "qlora" else 1e-6)
    before, after = weights(store, inputs["expansion"]), weights(store, fused(store, inputs, made))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and changed <= trained.keys()
    linears = {f"{name}.weight" for name in checkpoint_names(store, inputs["expansion"]).linears}
    assert linears <= changed
    assert all(tensor.isfinite().all() for tensor in after.values())
    delta = after["model.layers.1.mlp.up_proj.weight"].double() - before["model.layers.1.mlp.up_proj.weight"].double()
    assert method == "dora" or torch.linalg.matrix_rank(delta, rtol=1e-4) == 4


def adapted(store: Store, folder: Path, blocks: int = 2, **train: Any) -> tuple[Any, Any, Train, list[Any], Any]:
    """(model, names, section, groups, frozen) of an expansion with adapters in it."""
    base = store.snapshot(folder)
    made = apply(store, base, plan(model_config(store, base), Expand(blocks=blocks, positions=list(range(blocks)))))
    names, wanted = checkpoint_names(store, made), section(**train)
    torch.manual_seed(0)
    model = load_model(store.materialize(made), torch.float32)
    return model, names, wanted, *adapters.train_adapters(model, names, wanted, torch.device("cpu"))


@pytest.mark.parametrize("method", METHODS)
def test_what_trains_is_what_was_asked_for_and_lies_in_new_blocks(
    store: Store, make_family: MakeFamily, method: str  # noqa: F811
) -> None:
    # Three blocks of seven linears: above twenty names peft shortens its list to endings.
    model, _, _, groups, _ = adapted(store, make_family("qwen3"), blocks=3, adapter=adapter(method))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for group in groups for name in group.parameters}
    zeroed = ("self_attn.o_proj", "mlp.down_proj")
    others = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    norms = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
    expected = {f"{name}.weight" for name in norms}
    expected |= {f"{name}.lora_{side}.default.weight" for name in others for side in "AB"}
    if method == "dora":
        expected |= {f"{name}.lora_magnitude_vector.default.weight" for name in others}
        expected |= {f"{name}.weight" for name in zeroed}
    else:
        expected |= {f"{name}.lora_{side}.default.weight" for name in zeroed for side in "AB"}
    assert trained == {f"model.layers.{block}.{name}" for block in (1, 3, 5) for name in expected}


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_frozen_linears_under_adapters_take_their_products_in_bf16(
    store: Store, make_family: MakeFamily, method: str  # noqa: F811
) -> None:
    model = adapted(store, make_family("llama"), adapter=adapter(method), frozen="bf16")[0]
    linears = [module for module in model.get_decoder().layers.modules() if isinstance(module, torch.nn.Linear)]
    assert {type(linear) for linear in linears if linear.weight.requires_grad} == {torch.nn.Linear}
    assert {type(linear) for linear in linears if not linear.weight.requires_grad} == {Bf16Linear}


def test_modules_are_taken_exactly(store: Store, make_family: MakeFamily) -> None:  # noqa: F811
    modules = ["self_attn.v_proj", "self_attn.o_proj"]
    model, _, _, _, _ = adapted(store, make_family("llama"), adapter=adapter("lora", modules=modules))
    found = {name for name, _ in model.named_parameters() if "lora" in name}
    assert found == {
        f"model.layers.{b}.{m}.lora_{side}.default.weight" for b in (1, 3) for m in modules for side in "AB"
    }


@pytest.mark.parametrize("method", METHODS)
def test_a_training_that_was_interrupted_ends_in_the_same_snapshot(store: Store, fill: Fill, method: str) -> None:
    class Cut(StringIO):
        def write(self, text: str) -> int:
            if json.loads(text)["progress"]["done"] == 4 * ROW_TOKENS * BATCH_ROWS:
                raise KeyboardInterrupt
            return len(text)

    inputs = fill(store)
    spec = slice_(6, adapter=adapter(method), max_forward_kl=1.0, precision="bf16", checkpoint_every_steps=3)
    whole = stage.run(context(store, inputs, spec))
    work = store.work("b" * 64)
    with pytest.raises(KeyboardInterrupt):
        stage.run(StageContext(store, "b" * 64, inputs, spec, {}, work, Channel(Cut())))
    found = Checkpoints(work).read()
    assert found is not None and found[0].step == 3
    kinds = ("master/", "exp_avg/", "exp_avg_sq/", "step/", "rng/cpu")
    assert all(name.startswith(kinds) and "base_layer" not in name for name in found[1])
    assert {name.split(".")[2] for name in found[1] if name.startswith("master/")} == {"1", "3"}
    assert stage.run(context(store, inputs, spec, "b" * 64)) == whole


def test_a_four_bit_linear_takes_torchaos_values_and_their_gradient() -> None:
    from torchao.quantization import NF4Tensor

    torch.manual_seed(0)
    for dtype, shape, scales in ((torch.float32, (128, 256), 256), (torch.bfloat16, (96, 64), 32)):
        linear = nn.Linear(shape[1], shape[0], dtype=dtype)
        held = FourBitLinear(linear, torch.device("cpu"))
        weight, whole = held.dequantized(), linear.weight.detach()
        assert torch.equal(weight, NF4Tensor.from_tensor(whole, 64, scales).get_original_weight())
        assert 0.05 < float((weight - whole).norm() / whole.norm()) < 0.12
        x, y = (torch.randn(2, 5, shape[1], dtype=dtype, generator=torch.Generator().manual_seed(1)) for _ in range(2))
        x.requires_grad_(), y.requires_grad_()
        held(x).square().sum().backward()
        nn.functional.linear(y, weight, linear.bias).square().sum().backward()
        rounding = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(x.grad, y.grad, atol=rounding, rtol=rounding)
    zeros = nn.Linear(64, 64)
    nn.init.zeros_(zeros.weight)
    assert not FourBitLinear(zeros, torch.device("cpu")).dequantized().any()


def test_qlora_holds_every_frozen_linear_in_four_bits(store: Store, make_family: MakeFamily) -> None:  # noqa: F811
    folder = make_family("llama", hidden_size=128, intermediate_size=256)
    model, _, _, _, frozen = adapted(store, folder, adapter=adapter("qlora"))
    held = [m for m in model.modules() if isinstance(m, FourBitLinear)]
    assert len(held) == 7 * 5, "the base's three blocks and the two new ones"
    assert not [n for n, m in model.model.layers.named_modules() if type(m) is nn.Linear and "lora" not in n]
    taken = sum(getattr(m, f"weight_{part}").nbytes for m in held for part in PARTS)
    values = sum(m.quantized_values for m in held)
    assert 4.0 < 8 * taken / values < 4.4, "bits a value"
    assert any(name.endswith("base_layer.weight_quantized_data") for name in frozen.digests)
    from mansard.models.freeze import digest_tensors

    frozen.check(digest_tensors(model, frozen.digests))
    held[0].weight_quantized_data[0] ^= 1
    with pytest.raises(StageFailed, match=r"1 frozen tensors changed .*layers\.0\.self_attn\.q_proj\.weight_quantized"):
        frozen.check(digest_tensors(model, frozen.digests))


def test_the_base_under_adapters_that_changes_fails_the_stage(store: Store, make_family: MakeFamily) -> None:  # noqa: F811
    from mansard.models.freeze import digest_tensors

    model, _, _, _, frozen = adapted(store, make_family("llama"), adapter=adapter("dora"))
    assert "model.layers.0.self_attn.q_proj.weight" in frozen.digests
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.base_layer.weight[0, 0] += 1.0
    with pytest.raises(StageFailed, match=r"model\.layers\.1\.self_attn\.q_proj\.base_layer\.weight"):
        frozen.check(digest_tensors(model, frozen.digests))


def test_a_forward_pass_too_far_from_the_fused_models_is_refused(store: Store, fill: Fill) -> None:
    spec = slice_(2, adapter=adapter("qlora"), max_forward_kl=1e-9)
    with pytest.raises(StageFailed, match=r"max_forward_kl allows 1e-09; take adapter\.method: lora"):
        stage.run(context(store, fill(store), spec))


@pytest.mark.parametrize(
    ("modules", "told"),
    [
        (["q_proj", "self_attn.o_proj"], r"'q_proj' is no linear of the new blocks; exact names .* from mlp\.down"),
        (["model.layers.0.self_attn.q_proj"], "is not of a new block, and the base stays frozen"),
        (["model.layers.1.self_attn.q_proj"], "is one block's; exact names within a block"),
        (["lm_head"], "'lm_head' is not of a new block"),
        (["self_attn.q_proj"], "without mlp.down_proj or self_attn.o_proj a new block adds nothing"),
        (["input_layernorm"], "'input_layernorm' is no linear"),
    ],
)
def test_modules_that_are_not_the_new_blocks_are_refused(
    store: Store, make_family: MakeFamily, modules: list[str], told: str  # noqa: F811
) -> None:
    inputs = expanded(store, make_family("llama"))
    for method in METHODS:
        with pytest.raises(BadInput, match=told) as refused:
            stage.run(context(store, inputs, slice_(1, adapter=adapter(method, modules=modules))))
        assert "\n" not in str(refused.value)


def test_experts_are_refused(store: Store, make_family: MakeFamily) -> None:  # noqa: F811
    inputs = expanded(store, make_family("mixtral"))
    with pytest.raises(BadInput, match=r"train\.adapter: experts are one stack a block"):
        adapters.plan(checkpoint_names(store, inputs["expansion"]), Adapter(method="lora", rank=4, alpha=8.0))


def test_a_row_of_zeros_is_refused_by_dora_alone(store: Store, make_family: MakeFamily) -> None:  # noqa: F811
    inputs = expanded(store, make_family("llama"))
    names = checkpoint_names(store, inputs["expansion"])
    for method in ("dora", "lora"):
        model = load_model(store.materialize(inputs["expansion"]), torch.float32)
        with torch.no_grad():
            model.model.layers[3].mlp.up_proj.weight[5] = 0.0
        asked = Adapter.model_validate(adapter(method))
        if method == "lora":
            adapters.inject(model, adapters.plan(names, asked), asked)
            continue
        with pytest.raises(BadInput, match=r"row 5 of model\.layers\.3\.mlp\.up_proj is zero; take lora"):
            adapters.inject(model, adapters.plan(names, asked), asked)


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ({"adapter": adapter("lora", rank=0)}, "rank"),
        ({"adapter": adapter("lora", alpha=0.0)}, "alpha"),
        ({"adapter": adapter("lora", modules=[])}, "modules"),
        ({"adapter": adapter("ia3")}, "method"),
        ({"adapter": adapter("lora"), "learning_rates": {"new_blocks": 1e-3, "base": 1e-5}}, "base 0"),
        ({"adapter": adapter("qlora"), "frozen": "fp8", "precision": "bf16"}, "qlora needs frozen left out"),
        ({"adapter": adapter("qlora"), "frozen": "bf16", "precision": "fp32"}, "qlora needs frozen left out"),
        ({"adapter": adapter("lora"), "frozen": "bf16", "new_blocks": "bf16"}, "new_blocks left out"),
        ({"frozen": "bf16", "precision": "fp32", "learning_rates": {"new_blocks": 1e-3, "base": 1e-6}}, "base 0"),
        ({"adapter": adapter("dora"), "frozen": "fp8", "precision": "bf16"}, "lengths at every step"),
        ({"adapter": adapter("lora"), "frozen": "fp8", "new_blocks": "fp8", "precision": "bf16"}, "left out"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(train: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        section(**train)


def test_zero_3_takes_lora_alone() -> None:
    config = {"zero_optimization": {"stage": 3}}
    check_ranks(section(adapter=adapter("lora")), config, 2)
    for method in ("dora", "qlora"):
        check_ranks(section(adapter=adapter(method)), {"zero_optimization": {"stage": 2}}, 2)
        with pytest.raises(BadInput, match=rf"train\.adapter\.method: {method} needs ZeRO 1 or 2"):
            check_ranks(section(adapter=adapter(method)), config, 2)


@pytest.mark.parametrize(("method", "level"), [("qlora", 2), ("lora", 3)])
def test_two_ranks_train_adapters_as_one_process_does(
    store: Store, fill: Fill, method: str, level: int, forked_ranks: list[str]
) -> None:
    root = Path(mansard.__file__).resolve().parent.parent
    config = json.loads((root / f"configs/deepspeed/zero{level}.json").read_text())
    inputs, spec = fill(store), slice_(6, adapter=adapter(method), max_forward_kl=1.0)
    alone = stage.run(context(store, inputs, spec))
    asked = {"processes": 2, "config": config, "hang_seconds": 600.0, "launcher": tuple(forked_ranks)}
    together = stage.run(
        StageContext(store, "b" * 64, inputs, spec, {"ranks": asked}, store.work("b" * 64), Channel(StringIO()))
    )
    assert report_of(store, alone)["frozen"] == report_of(store, together)["frozen"]
    ours, theirs = (load(store.read_file(made, "trained.safetensors")) for made in (alone, together))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, atol=1e-3, rtol=1e-3, msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_the_forecast_counts_what_adapters_train(store: Store, make_family: MakeFamily, method: str) -> None:  # noqa: F811
    from mansard.training.data import as_batch
    from mansard.training.engines import LocalEngine
    from mansard.training.packing import pack
    from mansard.training.preflight import measure

    model, _, _, groups, _ = adapted(store, make_family("qwen3"), adapter=adapter(method))
    engine = LocalEngine(model, groups, 0.0, 1.0)
    torch.manual_seed(5)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    found = measure(engine, as_batch(*pack([[2 + (i * j) % 40 for j in range(1, 30)] for i in range(1, 5)], 16, 0)))
    assert torch.equal(torch.rand(3), drawn), "no random number is drawn"
    trained = sum(p.nbytes for group in groups for p in group.parameters.values())
    assert found.gradient_bytes == trained
    assert engine.optimizer_bytes().moments == 2 * trained
    assert [block.gradient_bytes > 0 for block in found.blocks] == [False, True, False, True, False]


def test_the_python_interface_takes_an_adapter(base_folder: Path, tmp_path: Path) -> None:
    for name in ("law", "general"):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl(texts(name, 40)))
    law, general = (mansard.Text(n, tmp_path / f"{n}.jsonl", is_domain=n == "law") for n in ("law", "general"))
    sources = [law, general]
    model = mansard.expand(base_folder, blocks=1, workspace=tmp_path / "work")
    trained = mansard.train(
        model, sources, tokens=2_000, sequence_tokens=32, adapter={"method": "lora", "rank": 4, "alpha": 8}
    )
    folder = mansard.save(mansard.fuse(trained), tmp_path / "upgraded")
    assert not [name for name in load_model(folder, None).state_dict() if "lora" in name]
    with pytest.raises(BadInput, match="adapter"):
        mansard.train(model, sources, tokens=2_000, adapter={"method": "lora", "rank": 4})


def test_adapters_take_an_anchor(store: Store, fill: Fill) -> None:
    drifts = []
    for anchor in (None, {"kind": "kl", "weight": 100.0}):
        spec = slice_(12, adapter=adapter("qlora"), max_forward_kl=1.0, anchor=anchor)
        made = stage.run(context(store, fill(store), spec, f"{len(drifts):064x}"))
        curve = report_of(store, made)["curve"]
        drifts.append(abs(curve[-1]["bits_per_byte"]["prose"] - curve[0]["bits_per_byte"]["prose"]))
    assert drifts[1] < drifts[0], "held to the base, it moves less on general text"
