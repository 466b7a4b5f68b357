"""Capture, training and composition as stages, on a real store and nodes that answer over HTTP."""

import io
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mansard.errors import BadInput, Corrupt
from mansard.store.snapshot import TensorFile
from mansard.store.store import Store
from mansard.worker import Channel, StageContext
from tests.mansard.carry_on.conftest import DATA, ROWS, SERVE, Filled, ServeStates

pytestmark = pytest.mark.slow
TRAIN = {
    "tokens": 1280, "batch_sequences": 4, "learning_rate": 3e-3, "precision": "fp32", "evaluate_every_steps": 5,
    "checkpoint_every_steps": 3,
}  # fmt: skip


def context(
    filled: Filled, inputs: dict[str, str], spec: dict[str, Any], where: dict[str, Any], work: Path
) -> StageContext:
    work.mkdir(exist_ok=True)
    return StageContext(filled.store, "0" * 64, inputs, spec, where, work, Channel(io.StringIO()))


def capture_spec(scheme: str = "bf16") -> dict[str, Any]:
    return {"data": DATA, "scheme": scheme, "rows": ROWS, "serve": SERVE, "engine": {}}


def nodes(*servers: Any) -> dict[str, Any]:
    return {"nodes": [{"endpoint": s.endpoint, "served_name": "base"} for s in servers]}


def captured(filled: Filled, serve_states: ServeStates, work: Path, scheme: str = "bf16") -> str:
    from mansard.carry_on.capture_stage import run

    return run(context(filled, filled.inputs, capture_spec(scheme), nodes(serve_states()), work))


def train_context(filled: Filled, capture: str, work: Path, **train: Any) -> StageContext:
    spec = {"data": DATA, "branch": {"width": 64}, "train": {**TRAIN, **train}, "alphas": [0.5, 1.0]}
    return context(filled, {"artifact": filled.base, "capture": capture}, spec, {}, work)


def test_captured_states_are_the_bases_and_every_sequence_was_asked_for_once(
    filled: Filled, serve_states: ServeStates, base_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from mansard.carry_on.cached import open_cache
    from mansard.carry_on.capture_stage import run
    from mansard.carry_on.sequences import distinct
    from mansard.carry_on.wire import decode
    from mansard.training.packing import mask_of

    monkeypatch.setattr("mansard.carry_on.filling.REQUEST_TOKENS", 32)  # many requests, in whose midst one dies
    first, second = serve_states(), serve_states(dies_after=2)
    snapshot = run(context(filled, filled.inputs, capture_spec(), nodes(first, second), tmp_path / "w"))
    cache = open_cache(filled.store, snapshot)
    texts = [*cache.texts("train"), *cache.texts("held_out")]
    probes = 2  # both nodes answered the probe once
    assert sum(first.asked) + sum(second.asked) == len(distinct(texts)) + probes
    batch = texts[0].batch([0, 3])
    coded, rows = cache.of(batch)
    x_BTD = decode(coded, torch.tensor(rows), torch.float32).view(2, 32, -1)
    with torch.no_grad():
        mask = mask_of(batch.positions_BT, torch.float32)
        wanted = base_model.model(
            input_ids=batch.tokens_BT, position_ids=batch.positions_BT, attention_mask=mask
        ).last_hidden_state
    torch.testing.assert_close(x_BTD, wanted, atol=0.03, rtol=0.01)


def test_captured_rows_are_the_first_of_the_text_as_it_is_packed_whole(
    filled: Filled, serve_states: ServeStates, tmp_path: Path
) -> None:
    from mansard.carry_on.cached import open_cache
    from mansard.models.loading import load_tokenizer
    from mansard.training.data import pack_texts

    cache = open_cache(filled.store, captured(filled, serve_states, tmp_path / "c"))
    tokenizer = load_tokenizer(filled.store.materialize(filled.base))
    for found in cache.texts("train"):
        raw = filled.store.read_file(filled.inputs[f"data.{found.name}.train"], "data.jsonl")
        lines = [json.loads(line)["text"] for line in raw.splitlines()]
        whole = pack_texts(found.name, lines, tokenizer, DATA["sequence_tokens"], DATA["seed"])
        assert len(found) == ROWS[found.name]["train"] < len(whole)
        assert (found.tokens_RT == whole.tokens_RT[: len(found)]).all()
        assert (found.positions_RT == whole.positions_RT[: len(found)]).all()
        assert found.bytes_per_token == whole.bytes_per_token
    assert not (tmp_path / "c" / "ids").exists()


def test_a_branch_learns_and_the_curves_start_at_the_base(
    filled: Filled, serve_states: ServeStates, tmp_path: Path
) -> None:
    from mansard.carry_on.train_stage import run

    capture = captured(filled, serve_states, tmp_path / "c", "fp8")
    made = run(train_context(filled, capture, tmp_path / "t"))
    report = json.loads(filled.store.read_file(made, "branch.json"))
    base, half, whole = (point["bits_per_byte"] for point in report["alphas"])
    assert [p["alpha"] for p in report["alphas"]] == [0.0, 0.5, 1.0]
    assert report["curve"][0]["bits_per_byte"] == pytest.approx(base)  # f starts at zero: the base itself
    assert whole["code"] < half["code"] < base["code"], report["alphas"]


def test_the_curves_over_alpha_are_of_the_branch_as_it_is_saved(
    filled: Filled, serve_states: ServeStates, tmp_path: Path
) -> None:
    import torch

    from mansard.carry_on import train_stage
    from mansard.carry_on.branch_file import load_branch
    from mansard.carry_on.cached import open_cache
    from mansard.carry_on.loader import Loader
    from mansard.composition.description import FILE
    from mansard.specs.carry_on import BranchTrain
    from mansard.specs.data import Data

    capture = captured(filled, serve_states, tmp_path / "c")
    asked = train_context(filled, capture, tmp_path / "t")
    made = train_stage.run(asked)
    saved, description = load_branch(filled.store.materialize(made) / FILE, filled.base)
    assert {p.dtype for p in saved.parameters()} == {torch.bfloat16}
    cache, train = open_cache(filled.store, capture), BranchTrain.model_validate(asked.spec["train"])
    mixture, held_out = train_stage._texts(cache, Data.model_validate(DATA), train)
    loader = Loader(cache, mixture, 64, is_pinned=False)
    branch, engine = train_stage.make_engine(asked, loader, description.shape, train, torch.device("cpu"))
    branch.load_state_dict({name: p.float() for name, p in saved.named_parameters()})
    told = json.loads(filled.store.read_file(made, "branch.json"))["alphas"]
    found = train_stage.alpha_curves(engine, held_out, asked.spec["alphas"])
    loader.close()
    for one, other in zip(told, found, strict=True):
        assert one["alpha"] == other["alpha"]
        assert one["bits_per_byte"] == pytest.approx(other["bits_per_byte"], rel=1e-6)


@pytest.mark.filterwarnings("ignore:::torch")  # the compiler's first import calls what torch itself deprecates
def test_a_branch_learns_in_bf16_with_moments_in_8_bits_and_no_masters(
    filled: Filled, serve_states: ServeStates, tmp_path: Path, capsys: Any
) -> None:
    from mansard.carry_on.train_stage import run

    capture = captured(filled, serve_states, tmp_path / "c", "fp8")
    lean = {"precision": "bf16", "optimizer": "adamw_8bit", "master": "stochastic_rounding"}
    made = run(train_context(filled, capture, tmp_path / "t", **lean))
    assert "optimizer's masters" not in capsys.readouterr().err
    report = json.loads(filled.store.read_file(made, "branch.json"))
    base, _, whole = (point["bits_per_byte"] for point in report["alphas"])
    assert whole["code"] < base["code"], report["alphas"]
    wide = run(train_context(filled, capture, tmp_path / "u", precision="bf16"))
    assert "optimizer's masters" in capsys.readouterr().err
    assert wide != made


def test_training_opens_nothing_of_the_base_but_its_head(
    filled: Filled, serve_states: ServeStates, tmp_path: Path
) -> None:
    from mansard.carry_on.train_stage import run

    capture = captured(filled, serve_states, tmp_path / "c")
    kept = {"lm_head.weight", "model.embed_tokens.weight"}
    for file in filled.store.manifest(filled.base).files.values():
        if isinstance(file, TensorFile):
            for name, digest in file.tensors.items():
                if name not in kept:
                    (filled.store.root / "objects" / digest[:2] / digest).unlink(missing_ok=True)
    shutil.rmtree(filled.store.root / "trees", ignore_errors=True)
    assert run(train_context(filled, capture, tmp_path / "t"))


def test_a_killed_training_ends_as_one_that_was_not(filled: Filled, serve_states: ServeStates, tmp_path: Path) -> None:
    from mansard.carry_on.train_stage import run

    capture = captured(filled, serve_states, tmp_path / "c")

    class Killed(Exception):
        pass

    class DyingChannel(Channel):
        def send(self, message: dict[str, Any]) -> None:
            if message["progress"]["done"] >= 7 * 128:
                raise Killed

    whole = run(train_context(filled, capture, tmp_path / "a"))
    dying = replace(train_context(filled, capture, tmp_path / "b"), channel=DyingChannel(io.StringIO()))
    with pytest.raises(Killed):
        run(dying)
    assert (tmp_path / "b" / "checkpoint.safetensors").exists()
    assert run(train_context(filled, capture, tmp_path / "b")) == whole


@pytest.mark.parametrize("how", ["flip", "cut"])
def test_a_damaged_cache_is_found_and_only_what_is_damaged_is_fetched_again(
    filled: Filled, serve_states: ServeStates, tmp_path: Path, how: str
) -> None:
    from mansard.carry_on.cached import open_cache
    from mansard.carry_on.capture_stage import run as capture_run
    from mansard.carry_on.mending import drop_damaged
    from mansard.carry_on.train_stage import run

    store = filled.store
    capture = captured(filled, serve_states, tmp_path / "c")
    shard = store.manifest(capture).files["shard-00000.safetensors"]
    assert isinstance(shard, TensorFile)
    victim = store.root / "objects" / shard.tensors["states"][:2] / shard.tensors["states"]
    data = bytearray(victim.read_bytes())
    victim.chmod(0o644)
    victim.write_bytes(data[:-2] if how == "cut" else bytes([data[0] ^ 1, *data[1:]]))
    if how == "flip":
        with pytest.raises(Corrupt, match="what is damaged is fetched again"):
            run(train_context(filled, capture, tmp_path / "t"))
    assert drop_damaged(store, capture) == ["shard-00000.safetensors"]
    node = serve_states()
    where = {**nodes(node), "salvage": capture}
    assert capture_run(context(filled, filled.inputs, capture_spec(), where, tmp_path / "again")) == capture
    assert sum(node.asked) > 0
    assert open_cache(store, capture).of(open_cache(store, capture).texts("train")[0].batch([0]))


def test_a_whole_shard_is_salvaged_without_asking_anyone(
    filled: Filled, serve_states: ServeStates, tmp_path: Path
) -> None:
    from mansard.carry_on.capture_stage import run as capture_run

    capture = captured(filled, serve_states, tmp_path / "c")
    where = {"nodes": [{"endpoint": "http://127.0.0.1:9", "served_name": "base"}], "salvage": capture}
    assert capture_run(context(filled, filled.inputs, capture_spec(), where, tmp_path / "again")) == capture


def test_a_node_that_is_down_is_done_without_and_with_none_the_capture_says_so(
    filled: Filled, serve_states: ServeStates, tmp_path: Path, capsys: Any
) -> None:
    from mansard.carry_on.capture_stage import run as capture_run
    from mansard.errors import StageFailed

    down = {"endpoint": "http://127.0.0.1:9", "served_name": "base"}
    where = {"nodes": [down, *nodes(serve_states())["nodes"]]}
    assert capture_run(context(filled, filled.inputs, capture_spec(), where, tmp_path / "a"))
    assert "http://127.0.0.1:9/v1/models: ConnectionRefusedError" in capsys.readouterr().err
    with pytest.raises(StageFailed, match=r"no inference node answers: http://127\.0\.0\.1:9"):
        capture_run(context(filled, filled.inputs, capture_spec(), {"nodes": [down]}, tmp_path / "b"))


def test_nodes_that_serve_another_base_are_refused(filled: Filled, serve_states: ServeStates, tmp_path: Path) -> None:
    from mansard.carry_on.capture_stage import run as capture_run
    from mansard.errors import StageFailed

    other = serve_states(root="/trees/" + "f" * 64)
    with pytest.raises(StageFailed, match="serves artifact ffffffffffff"):
        capture_run(context(filled, filled.inputs, capture_spec(), nodes(other), tmp_path / "a"))
    foreign = serve_states()
    foreign.cut = lambda text: [7] * len(text)
    with pytest.raises(BadInput, match="has another tokenizer than the base"):
        capture_run(context(filled, filled.inputs, capture_spec(), nodes(serve_states(), foreign), tmp_path / "c"))
    assert foreign.asked == []
    skewed = serve_states(scale=1.1)  # another quantization gives other states
    with pytest.raises(BadInput, match=r"differ by 0\.1\d\d on a probe"):
        capture_run(context(filled, filled.inputs, capture_spec(), nodes(serve_states(), skewed), tmp_path / "b"))


def test_a_node_whose_states_are_not_finite_is_left_alone_and_alone_ends_the_capture(
    filled: Filled, serve_states: ServeStates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mansard.carry_on.capture_stage import run as capture_run
    from mansard.carry_on.fetching import MAX_FAILURES, REQUESTS_PER_NODE
    from mansard.errors import MansardError

    monkeypatch.setattr("mansard.carry_on.filling.REQUEST_TOKENS", 32)  # many requests
    first, second = serve_states(), serve_states()
    asked = context(filled, filled.inputs, capture_spec(), nodes(first, second), tmp_path / "a")

    def spoil(states: Any, model: Any, body: dict[str, Any]) -> Any:
        if len(second.asked) > 1:  # the probe it answers well
            second.scale = float("nan")
        return states(model, body)

    second.states = partial(spoil, second.states)  # type: ignore[method-assign]
    made = capture_run(asked)
    assert made == captured(filled, serve_states, tmp_path / "whole")
    assert 1 < len(second.asked) <= 1 + MAX_FAILURES + REQUESTS_PER_NODE
    broken = context(filled, filled.inputs, capture_spec(), nodes(serve_states(scale=float("nan"))), tmp_path / "b")
    words = "no inference node is left: .*: the states hold values that are not finite; look at the node's base"
    with pytest.raises(MansardError, match=words) as refused:
        capture_run(broken)
    assert "\n" not in str(refused.value)


def test_a_sequence_longer_than_the_node_allows_is_refused(
    filled: Filled, serve_states: ServeStates, tmp_path: Path
) -> None:
    from mansard.carry_on.capture_stage import run as capture_run

    spec = {**capture_spec(), "data": {**DATA, "sequence_tokens": 256}}
    long = {f"data.{n}.{p}": filled.store.put_files({"data.jsonl": json.dumps({"text": "x y " * 900}).encode()})
            for n in ("code", "prose") for p in ("train", "held_out")}  # fmt: skip
    with pytest.raises(BadInput, match="takes 128 tokens, the longest sequence has 256"):
        capture_run(context(filled, {**filled.inputs, **long}, spec, nodes(serve_states()), tmp_path / "a"))


def test_states_of_another_base_train_no_branch(filled: Filled, serve_states: ServeStates, tmp_path: Path) -> None:
    from mansard.carry_on.train_stage import run

    capture = captured(filled, serve_states, tmp_path / "c")
    asked = train_context(filled, capture, tmp_path / "t")
    with pytest.raises(BadInput, match="the states are of base"):
        run(replace(asked, inputs={**asked.inputs, "artifact": capture}))


def test_a_composed_artifact_names_base_branch_and_alpha_and_costs_the_branch(
    filled: Filled, serve_states: ServeStates, tmp_path: Path
) -> None:
    from mansard.carry_on.train_stage import run
    from mansard.composition.compose import PLACE, compose, composition_of

    capture = captured(filled, serve_states, tmp_path / "c")
    branch = run(train_context(filled, capture, tmp_path / "t"))
    before = set(filled.store._objects.digests())
    artifact = compose(filled.store, filled.base, branch, 0.75)
    assert len(set(filled.store._objects.digests()) - before) == 1  # config.json
    found = composition_of(filled.store, artifact)
    assert found is not None and (found.base, found.branch, found.alpha) == (filled.base, branch, 0.75)
    assert composition_of(filled.store, filled.base) is None
    assert PLACE in filled.store.manifest(artifact).files
    with pytest.raises(BadInput, match="is a carry-on already"):
        compose(filled.store, artifact, branch, 1.0)
    with pytest.raises(BadInput, match="alpha -1"):
        compose(filled.store, filled.base, branch, -1.0)


def test_a_branch_of_another_base_is_not_composed(filled: Filled, serve_states: ServeStates, tmp_path: Path) -> None:
    from mansard.carry_on.train_stage import run
    from mansard.composition.compose import compose

    branch = run(train_context(filled, captured(filled, serve_states, tmp_path / "c"), tmp_path / "t"))
    other = _renamed(filled.store, filled.base)
    with pytest.raises(BadInput, match="customize derives it again on another base"):
        compose(filled.store, other, branch, 1.0)


def _renamed(store: Store, base: str) -> str:
    """The same model with one more file: another snapshot."""
    from mansard.store.snapshot import Blob, Manifest

    return store.put_manifest(Manifest({**store.manifest(base).files, "note.txt": Blob(store.put_bytes(b"x"), 1)}))
