"""The anchor: the base inside the expanded model, and how far training goes from it on general text."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import kl_div

from mansard import Text, expand, fuse, save, train
from mansard.api import Model
from mansard.errors import BadInput
from mansard.models.bypass import bypassed
from mansard.models.loading import load_model, load_tokenizer
from mansard.specs.training import Train
from mansard.training import head_loss
from mansard.training.anchor import Anchor
from mansard.training.data import Mixture, Packed, as_batch
from mansard.training.engines import LocalEngine, Objective
from mansard.training.head_loss import HeadLoss
from mansard.training.optimizer import Group
from mansard.training.packing import pack
from mansard.training.ranks import check_ranks

CPU = torch.device("cpu")
ROW = 16


@pytest.fixture
def expanded(base_folder: Path, tmp_path: Path) -> Model:
    return expand(base_folder, blocks=2, workspace=tmp_path / "workspace")


def moved(folder: Path) -> Any:
    """The expansion in float32, its new blocks no longer silent."""
    model = load_model(folder, torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for block in (model.model.layers[1], model.model.layers[3]):
            for weight in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
                weight.normal_(0.0, 0.3)
    return model.requires_grad_(False)


def batch_of(rows: int = 4) -> Any:
    texts = [[2 + (i * j) % 90 for j in range(1, 2 + 5 * i)] for i in range(1, 9)]
    tokens, positions = pack(texts, ROW, 0)
    return as_batch(tokens[:rows], positions[:rows], torch.tensor([True, False, True, True][:rows]))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk_values", [60 * 16, 2**26])
def test_divergence_and_its_gradient_are_those_of_torch(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None, chunk_values: int
) -> None:
    monkeypatch.setattr(head_loss, "CHUNK_VALUES", chunk_values)
    torch.manual_seed(0)
    weights = nn.Linear(24, 60, bias=False).requires_grad_(False)
    head = HeadLoss(weights, softcap, CPU)
    base, states, counts = torch.randn(50, 24), torch.randn(50, 24), torch.rand(50) < 0.8
    found, exact = states.clone().requires_grad_(), states.clone().requires_grad_()
    nats = head.divergence(base, found, counts)
    terms = kl_div(
        head.logits(exact).log_softmax(-1), head.logits(base).log_softmax(-1), log_target=True, reduction="none"
    )
    reference = (terms.sum(-1) * counts).sum()
    torch.testing.assert_close(nats, reference)
    (nats / 7).backward()
    (reference / 7).backward()
    torch.testing.assert_close(found.grad, exact.grad)
    torch.testing.assert_close(head.divergence(states, states, counts), torch.zeros(()))


def test_hidden_states_drift_by_their_squared_distance_over_the_bases_squared_length() -> None:
    base = torch.tensor([[3.0, 4.0], [1.0, 0.0], [5.0, 12.0]])
    here = torch.tensor([[3.0, 9.0], [7.0, 7.0], [5.0, 25.0]])
    counts, head = torch.tensor([True, False, True]), HeadLoss(nn.Linear(2, 3, bias=False), None, CPU)
    moved_NH = here.clone().requires_grad_()
    drift = Anchor("mse", 1.0, ()).drift(head, moved_NH, base, counts)
    drift.backward()
    torch.testing.assert_close(drift, torch.tensor(25 / 25 + 169 / 169))
    torch.testing.assert_close(moved_NH.grad, torch.tensor([[0.0, 10 / 25], [0.0, 0.0], [0.0, 26 / 169]]))


def test_the_base_is_the_model_with_its_new_blocks_passed_by(
    base_folder: Path, expanded: Model, tmp_path: Path
) -> None:
    model, base = moved(save(expanded, tmp_path / "expansion")), load_model(base_folder, torch.float32)
    here, alone, batch = Objective(model), Objective(base), batch_of()
    with torch.no_grad():
        changed = here.hidden(batch)
        with bypassed(model.model.layers, (1, 3)):
            passed = here.hidden(batch)
        assert torch.equal(passed, alone.hidden(batch))
        assert torch.equal(here.hidden(batch), changed)
        assert not torch.equal(passed, changed)


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_only_general_rows_drift_and_micro_batches_change_nothing(kind: str, expanded: Model, tmp_path: Path) -> None:
    folder = save(expanded, tmp_path / "expansion")
    gradients = []
    for rows in (None, 1):
        model = moved(folder)
        trained = {n: p.requires_grad_() for n, p in model.named_parameters() if n.startswith("model.layers.1.")}
        group = Group("new_blocks", 1e-2, trained)
        engine = LocalEngine(model, [group], 0.0, 1.0, micro_batch_sequences=rows, anchor=Anchor(kind, 0.5, (1, 3)))
        loss = engine.gradients(batch_of())
        assert loss.drift > 0.0
        gradients.append((loss.drift, {name: p.grad.clone() for name, p in trained.items()}))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-4)
    for name, gradient in gradients[0][1].items():
        torch.testing.assert_close(gradient, gradients[1][1][name], rtol=1e-3, atol=1e-6)
    none = batch_of().each(lambda tensor: torch.zeros_like(tensor) if tensor.dtype == torch.bool else tensor)
    assert engine.gradients(none).drift == 0.0
    assert engine.evaluate([batch_of()]).drift == 0.0


def sources(folder: Path) -> list[Text]:
    found = []
    for name in ("code", "prose"):
        path = folder / f"{name}.jsonl"
        rows = [{"text": f"{name} {i}: " + " ".join(f"{name}{(i * 7 + j) % 23}" for j in range(40))} for i in range(30)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found.append(Text(name, path, weight=0.5, is_domain=name == "code"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_an_anchored_training_stays_nearer_to_the_base_and_still_learns(
    kind: str, base_folder: Path, expanded: Model, tmp_path: Path
) -> None:
    texts = sources(tmp_path)
    settings: dict[str, Any] = {"learning_rate": 1e-2, "sequence_tokens": 32, "batch_sequences": 4, "precision": "fp32"}
    far, curves = {}, {}
    for name, anchor in (("plain", None), ("anchored", {"kind": kind, "weight": 100.0})):
        trained = train(expanded, texts, 20 * 128, **settings, anchor=anchor)
        assert trained.trained is not None
        report = json.loads(trained.store.read_file(trained.trained, "training.json"))
        assert report["frozen"] and report["changed_base_tensors"] == []
        curves[name] = [point["bits_per_byte"]["code"] for point in report["curve"]]
        far[name] = distance(base_folder, save(fuse(trained), tmp_path / name), texts[1].path)
    print(far)
    assert far["anchored"] < 0.7 * far["plain"]
    assert curves["anchored"][-1] < curves["anchored"][0]


def distance(base_folder: Path, other: Path, texts: Path) -> float:
    """Mean KL of the base to the other on general text, nats a token."""
    lines = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    tokenizer = load_tokenizer(base_folder)
    tokens, _ = pack(tokenizer(lines, add_special_tokens=False)["input_ids"], 32, None)
    with torch.no_grad():
        models = [load_model(path, torch.float32) for path in (base_folder, other)]
        base, here = (model(torch.from_numpy(tokens).long()).logits.log_softmax(-1) for model in models)
    return float((base.exp() * (base - here)).sum(-1).mean())


def test_what_cannot_be_anchored_is_refused(expanded: Model, tmp_path: Path) -> None:
    domain = [Text("code", sources(tmp_path)[0].path, is_domain=True)]
    with pytest.raises(BadInput, match=r"no general text in data\.sources; add a source with is_domain: false"):
        train(expanded, domain, 128, sequence_tokens=32, batch_sequences=4, precision="fp32", anchor={"weight": 1.0})
    rates = {"new_blocks": 1e-3, "base": 1e-6}
    asked = {"tokens": 128, "batch_sequences": 4, "learning_rates": rates, "anchor": {"weight": 1.0}}
    with pytest.raises(ValueError, match=r"anchor needs learning_rates\.base 0"):
        Train.model_validate(asked)
    spec = Train.model_validate({**asked, "learning_rates": {"new_blocks": 1e-3}})
    with pytest.raises(BadInput, match=r"train\.anchor needs ZeRO 1 or 2"):
        check_ranks(spec, {"zero_optimization": {"stage": 3}}, 2)


def test_batches_know_their_general_rows() -> None:
    rows = torch.arange(64).view(4, ROW).int().numpy()
    mixture = Mixture([Packed(n, rows, rows, 3.0) for n in ("code", "prose")], [0.5, 0.5], 4, 0, {"prose"})
    assert [int(row) for row in mixture.batch(3).general_rows] == [1, 3]
