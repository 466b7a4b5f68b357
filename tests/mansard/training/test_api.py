"""The Python API does what the README shows, on a very small model."""

import json
import shutil
from pathlib import Path

import pytest

from mansard import Text, expand, fuse, train
from mansard.errors import BadInput
from mansard.models.model_files import model_config
from mansard.models.storeys import read_expansion
from tests.mansard.training.conftest import jsonl, texts

pytestmark = pytest.mark.slow

README = Path(__file__).resolve().parents[3] / "README.md"


@pytest.fixture
def folder(tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a base and two files of text, as a reader of the README would have."""
    shutil.copytree(base_folder, tmp_path / "models/base")
    for name in ("law", "general"):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl(texts(name, 40)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme_text_makes_a_deeper_model_that_transformers_loads(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    code = README.read_text().split("## From Python")[1].split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    model = AutoModelForCausalLM.from_pretrained(folder / "models/upgraded")
    assert model.config.num_hidden_layers == 4
    exec(compile(code.replace("models/upgraded", "models/again"), "README.md", "exec"), {})
    made = [(folder / f"models/{n}/model.safetensors").read_bytes() for n in ("upgraded", "again")]
    assert made[0] == made[1]


def test_blocks_are_placed_where_general_text_misses_them_least(folder: Path) -> None:
    general = Text("general", "general.jsonl")
    probe = {"rows": 4, "tokens": 48}
    model = expand("models/base", blocks=1, positions="importance", texts=[general], probe=probe)
    measured = model.store.lineage(model.snapshot)[0]["inputs"]["importance"]
    gains = json.loads(model.store.read_file(measured, "importance.json"))["gains"]
    assert [b.source for b in read_expansion(model.store, model.snapshot).new_blocks] == [gains.index(min(gains))]
    with pytest.raises(BadInput, match="importance needs general text"):
        expand("models/base", blocks=1, positions="importance", texts=[Text("law", "law.jsonl", is_domain=True)])


def test_an_average_has_the_old_depth(folder: Path) -> None:
    sizes = {"tokens": 512, "sequence_tokens": 32, "batch_sequences": 2}
    model = train(expand("models/base", blocks=1), [Text("law", "law.jsonl", is_domain=True)], **sizes)
    made = fuse(model, method="average", weight=0.25)
    assert model_config(made.store, made.snapshot)["num_hidden_layers"] == 2
    assert made.store.lineage(made.snapshot)[0]["spec"] == {"weight": 0.25}
    with pytest.raises(BadInput, match=r"weight 0\.5 goes with method: average"):
        fuse(model, weight=0.5)


def test_what_cannot_be_used_is_refused_in_one_line(folder: Path) -> None:
    with pytest.raises(BadInput, match=r"expand\.blocks: 9 in a model of 2 blocks"):
        expand("models/base", blocks=9)
    model = expand("models/base", blocks=1)
    with pytest.raises(BadInput, match="not trained yet"):
        fuse(model)
    with pytest.raises(BadInput, match="tokenz"):
        train(model, [Text("law", "law.jsonl", is_domain=True)], tokens=1000, tokenz=3)
    with pytest.raises(BadInput, match=r"law: cannot read nowhere\.jsonl: No such file"):
        train(model, [Text("law", "nowhere.jsonl", is_domain=True)], tokens=1000)


def test_unknown_keys_of_a_config_are_named_at_once_and_ignored_by_name(folder: Path) -> None:
    config = folder / "models/base/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "mystery": 1, "riddle": 2, "unsloth_fixed": True}))
    with pytest.raises(BadInput, match=r"unknown keys for llama \('mystery', 'riddle'\)"):
        expand("models/base", blocks=1)
    model = expand("models/base", blocks=1, ignore_config_keys=["mystery", "riddle"])
    assert model_config(model.store, model.snapshot)["riddle"] == 2
