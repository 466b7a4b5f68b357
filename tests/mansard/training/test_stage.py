"""Stage `train`, whole: what trains is what the expansion inserted, and a kill loses nothing."""

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load

import mansard
from mansard.errors import BadInput, StageFailed
from mansard.launch import Request, derive, recipe_of, this_interpreter
from mansard.models.loading import load_model
from mansard.models.probe import are_bit_equal, forward_logits
from mansard.records import SnapshotId
from mansard.site import Site
from mansard.specs.data import Data
from mansard.store.store import Store
from mansard.training import stage
from mansard.training.data import Mixture, Packed
from mansard.training.learning import achieved_fractions
from mansard.training.state import Checkpoints
from mansard.worker import Channel, StageContext

pytestmark = pytest.mark.slow

Fill = Callable[[Store], dict[str, SnapshotId]]
ROOT = Path(mansard.__file__).resolve().parent.parent
ROW_TOKENS = 32
BATCH_ROWS = 4
CHECKPOINT_STEPS = 10


def slice_(steps: int = 6, weights: tuple[float, float] = (0.6, 0.4), **train: Any) -> dict[str, Any]:
    """The stage's slice of a spec; keys of `train` replace those of the training section."""
    sources = [
        {"name": n, "train": f"{n}.train", "held_out": f"{n}.held-out", "weight": w, "is_domain": n == "code"}
        for n, w in zip(("code", "prose"), weights, strict=True)
    ]
    return {
        "data": {"sources": sources, "sequence_tokens": ROW_TOKENS, "min_domain_fraction": 0.3, "seed": 0},
        "train": {
            "tokens": steps * ROW_TOKENS * BATCH_ROWS,
            "batch_sequences": BATCH_ROWS,
            "learning_rates": {"new_blocks": 1e-2, "base": 0.0},
            "precision": "fp32",
            "evaluate_every_steps": 3,
            "checkpoint_every_steps": 2,
            **train,
        },
    }


class Spoken(StringIO):
    """What a stage tells its parent; `on_progress` is called with each message."""

    def __init__(self, on_progress: Callable[[dict[str, Any]], None] = lambda progress: None) -> None:
        super().__init__()
        self.progress: list[dict[str, Any]] = []
        self._on_progress = on_progress

    def write(self, text: str) -> int:
        self.progress.append(json.loads(text)["progress"])
        self._on_progress(self.progress[-1])
        return len(text)


def run(store: Store, inputs: dict[str, SnapshotId], spec: dict[str, Any], spoken: Spoken | None = None) -> SnapshotId:
    recipe = "a" * 64
    channel = Channel(spoken or Spoken())
    return stage.run(StageContext(store, recipe, inputs, spec, {}, store.work(recipe), channel))


def report_of(store: Store, snapshot: SnapshotId) -> dict[str, Any]:
    report = json.loads(store.read_file(snapshot, "training.json"))
    assert isinstance(report, dict)
    return report


def tensors_of(store: Store, snapshot: SnapshotId, file: str) -> dict[str, torch.Tensor]:
    return load(store.read_file(snapshot, file))


def models_in_memory() -> list[torch.nn.Module]:
    """Those that still have their tensors: quantization leaves husks behind."""
    found = [o for o in gc.get_objects() if type(o).__name__ == "LlamaForCausalLM"]
    return [model for model in found if dict(model.named_parameters())]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_the_new_blocks_train_and_the_report_says_so(store: Store, fill: Fill, precision: str) -> None:
    inputs, spoken = fill(store), Spoken()
    made = run(store, inputs, slice_(precision=precision), spoken)
    trained = tensors_of(store, made, "trained.safetensors")
    assert {name.split(".")[2] for name in trained} == {"1", "3"}
    assert all(t.dtype == torch.bfloat16 for t in trained.values())
    assert trained["model.layers.1.self_attn.o_proj.weight"].any()
    report = report_of(store, made)
    assert report["new_blocks"] == [{"index": 1, "source": 0}, {"index": 3, "source": 1}]
    assert report["changed_base_tensors"] == []
    assert not report["frozen"].keys() & trained.keys()
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"} <= report[
        "frozen"
    ].keys()
    assert report["fractions"] == pytest.approx({"code": 0.6, "prose": 0.4}, abs=0.05)
    assert [point["step"] for point in report["curve"]] == [0, 3, 6]
    assert spoken.progress[0]["done"] == 0
    assert "new blocks 1 (copy of 0), 3 (copy of 1)" in spoken.progress[0]["text"]
    assert "expected memory" in spoken.progress[0]["text"]
    assert {"loss", "bits_per_byte_code", "bits_per_byte_prose"} <= spoken.progress[-1]["metrics"].keys()
    assert spoken.progress[-1]["done"] == spoken.progress[-1]["total"] == report["tokens"]


def test_the_probe_is_what_the_trained_checkpoint_answers(store: Store, fill: Fill) -> None:
    inputs = fill(store)
    made = run(store, inputs, slice_())
    trained, probe = (tensors_of(store, made, f"{name}.safetensors") for name in ("trained", "probe"))
    model = load_model(store.materialize(inputs["expansion"]), None)
    untrained = forward_logits(model, probe["input_ids"], "cpu")
    model.load_state_dict(trained, strict=False)
    assert are_bit_equal(forward_logits(model, probe["input_ids"], "cpu"), probe["logits"])
    assert not are_bit_equal(untrained, probe["logits"])


def test_the_same_inputs_train_the_same_snapshot(store: Store, fill: Fill) -> None:
    inputs = fill(store)
    made = run(store, inputs, slice_())
    store.discard_work("a" * 64)
    assert run(store, inputs, slice_()) == made


def test_a_frozen_tensor_that_changes_fails_the_stage(store: Store, fill: Fill) -> None:
    def flip(progress: dict[str, Any]) -> None:
        if progress["done"] == 2 * ROW_TOKENS * BATCH_ROWS:
            for model in models_in_memory():
                weights = dict(model.named_parameters())
                with torch.no_grad():
                    if "model.norm.weight" in weights:  # another test's model may have let go of its tensors
                        weights["model.norm.weight"][3] += 1.0

    with pytest.raises(StageFailed, match=r"1 frozen tensors changed during training, e\.g\. model\.norm\.weight"):
        run(store, fill(store), slice_(), Spoken(flip))


def test_a_base_rate_trains_the_base_and_calls_nothing_frozen(store: Store, fill: Fill) -> None:
    made = run(store, fill(store), slice_(learning_rates={"new_blocks": 1e-2, "base": 1e-2}))
    report = report_of(store, made)
    assert report["frozen"] == {}
    assert {"lm_head.weight", "model.layers.0.mlp.up_proj.weight"} <= set(report["changed_base_tensors"])
    assert not [name for name in report["changed_base_tensors"] if name.startswith("model.layers.1.")]
    trained = tensors_of(store, made, "trained.safetensors")
    assert set(report["changed_base_tensors"]) <= trained.keys()


def test_a_rate_of_nothing_for_the_new_blocks_is_refused(store: Store, fill: Fill) -> None:
    with pytest.raises(BadInput, match=r"learning_rates\.new_blocks is 0"):
        run(store, fill(store), slice_(learning_rates={"new_blocks": 0.0, "base": 1e-3}))


def test_products_in_bf16_train_the_same_storey_nearly(store: Store, fill: Fill, capfd: Any) -> None:
    inputs = fill(store)
    exact = run(store, inputs, slice_())
    capfd.readouterr()
    made = run(store, inputs, slice_(frozen="bf16", new_blocks="bf16"))
    assert "compute fp32 with products of frozen linears in bf16, of those that train in bf16" in capfd.readouterr().err
    curves = [[point["bits_per_byte"]["code"] for point in report_of(store, m)["curve"]] for m in (exact, made)]
    assert curves[0] != curves[1]
    assert report_of(store, made)["products"] == {"frozen": "bf16", "new_blocks": "bf16"}
    assert curves[0] == pytest.approx(curves[1], rel=0.02)
    moved = [tensors_of(store, m, "trained.safetensors") for m in (exact, made)]
    assert moved[0].keys() == moved[1].keys()
    assert report_of(store, made)["frozen"] == report_of(store, exact)["frozen"]


def test_fp8_is_refused_where_there_is_none(store: Store, fill: Fill) -> None:
    with pytest.raises(BadInput, match=r"train\.frozen: fp8 needs FP8 matrix units, and this is a CPU"):
        run(store, fill(store), slice_(precision="bf16", frozen="fp8"))


def test_a_trainer_that_computes_another_function_fails_the_stage(store: Store, fill: Fill) -> None:
    with pytest.raises(StageFailed, match=r"nats a token from the fused model's, train\.max_forward_kl allows 1e-12"):
        run(store, fill(store), slice_(precision="fp32", max_forward_kl=1e-12))


def test_a_source_without_a_snapshot_is_refused(store: Store, fill: Fill) -> None:
    inputs = fill(store)
    del inputs["data.prose.held_out"]
    with pytest.raises(BadInput, match=r"data\.prose\.held_out: no such input"):
        run(store, inputs, slice_())


def test_a_mixture_below_the_domain_fraction_is_refused() -> None:
    data = Data.model_validate(slice_()["data"])
    rows = numpy.zeros((8, 4), dtype=numpy.int32)
    mixture = Mixture([Packed(n, rows, rows, 3.0) for n in ("code", "prose")], [0.6, 0.4], 4, 0)
    assert achieved_fractions(mixture, data, 10) == {"code": 0.6, "prose": 0.4}
    strict = data.model_copy(update={"min_domain_fraction": 0.9})
    with pytest.raises(
        BadInput, match=r"takes 24 of 40 rows from domain data, data\.min_domain_fraction asks for 0\.9"
    ):
        achieved_fractions(mixture, strict, 10)


def test_a_killed_training_ends_in_the_same_snapshot(tmp_path: Path, fill: Fill) -> None:
    spec = slice_(steps=80, checkpoint_every_steps=CHECKPOINT_STEPS, evaluate_every_steps=40)
    environment = this_interpreter(ROOT)
    made = []
    for name in ("whole", "killed"):
        site = Site(
            path=tmp_path / "site.yaml",
            home=tmp_path / name,
            data=tmp_path / "data",
            models=("demo",),
            environments={"main": environment},
            stages={"default": "main"},
        )
        store = Store(site.store)
        request = Request("train", fill(store), spec)
        if name == "killed":
            recipe = recipe_of(request, environment.lock)
            kill_after_first_checkpoint(site, store, request, recipe)
            found = Checkpoints(store.work(recipe)).read()
            assert found is not None and 0 < found[0].step < 80
            assert store.recall(recipe) is None
        made.append(derive(store, site, request))
    assert [d.reused for d in made] == [False, False]
    assert made[0].snapshot == made[1].snapshot


def kill_after_first_checkpoint(site: Site, store: Store, request: Request, recipe: str) -> None:
    """Start the worker as `derive` does, and `kill -9` it once a checkpoint is there."""
    checkpoint = Checkpoints(store.work(recipe)).path
    message = {
        "format": 1, "store": str(store.root), "stage": "train", "packages": {}, "log": "",
        "requests": [{"recipe": recipe, "inputs": dict(request.inputs), "spec": dict(request.spec), "where": {}}],
    }  # fmt: skip
    request_file = site.home / "request.json"
    request_file.write_text(json.dumps(message))
    with (site.home / "killed.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mansard.worker", "train", str(request_file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=site.home,
            start_new_session=True,
        )
        assert process.stdin is not None and process.stdout is not None
        with process.stdin, process.stdout:
            for line in process.stdout:
                progress = json.loads(line).get("progress", {"done": 0})
                # A thread writes the checkpoint; the steps go on meanwhile.
                if progress["done"] >= CHECKPOINT_STEPS * ROW_TOKENS * BATCH_ROWS and checkpoint.exists():
                    break
            os.killpg(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL, (site.home / "killed.log").read_text()
