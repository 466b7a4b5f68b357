"""How an upgrade asks for its text: once for all models with one tokenizer."""

import json
from pathlib import Path

from mansard.models.tokenizer_files import take_tokenizer
from mansard.spec_files import load_spec
from mansard.specs.whole import UpgradeSpec
from mansard.store.store import Store
from tasks.snapshots import TakenData
from tasks.training import tokenize_asked

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "transformers_version": "5.17.0"}


def model(store: Store, tokenizer: bytes = b"{}", **config: object) -> str:
    files = {"config.json": json.dumps({**CONFIG, **config}).encode(), "tokenizer.json": tokenizer}
    return store.put_files(files)


def test_every_part_of_every_source_is_asked_for_by_its_name(store: Store) -> None:
    spec = load_spec(UpgradeSpec, ROOT / "configs/upgrade/demo.yaml")
    data = (TakenData("code", "1" * 64, "2" * 64), TakenData("docstrings", "3" * 64, "4" * 64))
    base = model(store)
    asked = tokenize_asked(store, base, data, spec.data)
    assert list(asked) == ["data.code.train", "data.code.held_out", "data.docstrings.train", "data.docstrings.held_out"]
    one = asked["data.docstrings.held_out"]
    assert one.request.inputs == {"tokenizer": take_tokenizer(store, base), "data.docstrings.held_out": "4" * 64}
    assert one.request.spec == {"sequence_tokens": 256, "seed": 0}
    assert one.inputs().data == {"data.docstrings.held_out": "4" * 64}


def test_a_deeper_model_with_the_same_tokenizer_asks_for_the_same(store: Store) -> None:
    data = (TakenData("code", "1" * 64, "2" * 64),)
    mixture = load_spec(UpgradeSpec, ROOT / "configs/upgrade/demo.yaml").data
    asked = [
        tokenize_asked(store, m, data, mixture)
        for m in (model(store), model(store, num_hidden_layers=4), model(store, tokenizer=b'{"other": 1}'))
    ]
    base, deeper, other = ([one.request for one in each.values()] for each in asked)
    assert base == deeper != other
