import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mansard.errors import BadInput, NotAllowed
from mansard.evaluation.suites import take_suite
from mansard.records import Registration
from mansard.release import keys
from mansard.release.journal import Journal
from mansard.site import load_site
from mansard.specs.whole import UpgradeSpec
from mansard.store.store import Store
from tasks.intake import asked_for, check_power, read_order, terms_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> Path:
    """The shipped configs, with a site of their own, ada's key, text and items."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    site_file = tmp_path / "configs/site/local.yaml"
    text = tmp_path / ".mansard/data/corpus"
    text.mkdir(parents=True)
    for name in ("code", "docstrings"):
        for part in ("train", "held-out"):
            (text / f"{name}.{part}.jsonl").write_text('{"text": "x = 1", "file": "a.py"}\n')
        (text / f"{name}-bits.jsonl").write_text('{"id": "1", "file": "a.py", "text": "x = 1"}\n')
        (text / f"{name}-next-line.jsonl").write_text(
            '{"id": "1", "file": "a.py", "context": "x", "choices": ["a", "b", "c", "d"], "answer": 0}\n'
        )
    keys.generate_key("ada", load_site(site_file))
    change(tmp_path, base={"path": "base"}, quantize={"scheme": "none"})
    make_checkpoint(depth=1).rename(tmp_path / ".mansard/data/base")
    return tmp_path


def registered_base(folder: Path, model: Path) -> None:
    """The model is version 1, served as it is."""
    site = load_site(folder / "configs/site/local.yaml")
    snapshot = Store.of(site).snapshot(model)
    registration = Registration(
        model_name="demo", model=snapshot, artifact=snapshot, verdict="baseline", verdict_record="e" * 64,
        fingerprint="f" * 64, item_records=(), base_version=None, baseline_version=None, anchor_version=None,
        author="ada", spec_name="demo", spec_digest="0" * 64, serve={}, release={}, stages=(),
    )  # fmt: skip
    with Journal.open(site.journal) as journal:
        journal.register(registration, None)


def change(folder: Path, **sections: Any) -> None:
    path = folder / "configs/upgrade/demo.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **sections}, sort_keys=False))


def read(folder: Path, **more: Any) -> Any:
    return read_order(UpgradeSpec, folder / "configs/upgrade/demo.yaml", folder / "configs/site/local.yaml", **more)


def test_an_order_holds_everything_that_was_asked_for(folder: Path) -> None:
    order = read(folder)
    assert (order.model_name, order.author) == ("demo", "ada")
    assert [s.name for s in order.suites] == ["code-bits", "docstrings-bits", "code-next-line", "docstrings-next-line"]


def test_what_was_asked_for_changes_with_the_items_of_a_suite(folder: Path) -> None:
    order = read(folder)
    assert asked_for(order, (("code-bits", "a" * 64),)) != asked_for(order, (("code-bits", "b" * 64),))
    assert asked_for(order, (("code-bits", "a" * 64),)) == asked_for(read(folder), (("code-bits", "a" * 64),))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "cannot read"),
        (b"", "is empty"),
        (b'{"text": "\xff"}\n', "is not UTF-8"),
        (b"text\n", "not JSON"),
        (b'{"words": "x"}\n', "no text in it"),
    ],
)
def test_a_bad_data_file_is_one_line_that_names_key_and_file(folder: Path, data: bytes | None, message: str) -> None:
    path = folder / ".mansard/data/corpus/code.train.jsonl"
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(BadInput, match=message) as raised:
        read(folder)
    assert "data.sources.code.train" in str(raised.value)
    assert "code.train.jsonl" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_author_without_a_key_here_is_told_before_anything_starts(folder: Path) -> None:
    with pytest.raises(NotAllowed, match=r"mansard keygen grace|not author"):
        read(folder, as_person="grace")
    change(folder, author="mallory")
    with pytest.raises(NotAllowed, match="mallory"):
        read(folder)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"path": "nowhere"}, "not a folder"),
        ({"version": 1}, "no version 1"),
        ({"version": "stable"}, "nothing of demo is stable"),
    ],
)
def test_a_base_that_is_not_there_is_told_before_anything_starts(
    folder: Path, base: dict[str, Any], message: str
) -> None:
    change(folder, base=base)
    with pytest.raises(BadInput, match=message):
        read(folder)


def test_a_base_with_a_pickle_is_refused(folder: Path) -> None:
    (folder / ".mansard/data/base/pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(BadInput, match="pickle"):
        read(folder)


@pytest.mark.parametrize("comes", ["from a folder", "as a version"])
def test_a_group_that_does_not_divide_a_width_is_refused_before_anything_starts(folder: Path, comes: str) -> None:
    base = folder / ".mansard/data/base"
    if comes == "as a version":
        registered_base(folder, base)
        shutil.rmtree(base)
        change(folder, base={"version": 1})
    change(folder, quantize={"scheme": "awq", "group_size": 64, "source": "code"})
    with pytest.raises(BadInput, match=r"^quantize.group_size: 64 does not divide the input width 24 of model\.") as no:
        read(folder)
    assert "no group size divides all; scheme: none serves it as it is" in str(no.value)
    assert "\n" not in str(no.value)
    change(folder, quantize={"scheme": "none"})
    read(folder)


def test_keys_of_the_base_that_the_spec_names_are_ignored(folder: Path) -> None:
    config = folder / ".mansard/data/base/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "mystery": 1, "riddle": 2}))
    with pytest.raises(BadInput, match=r"unknown keys for llama \('mystery', 'riddle'\); .* ignore_config_keys"):
        read(folder)
    change(folder, base={"path": "base", "ignore_config_keys": ["mystery", "riddle"]})
    named = read(folder).spec.digest()
    config.write_text(json.dumps({**json.loads(config.read_text()), "enigma": 3}))
    change(folder, base={"path": "base", "ignore_config_keys": ["mystery", "riddle", "enigma"]})
    assert read(folder).spec.digest() != named
    change(folder, base={"path": "base", "ignore_config_keys": ["mistery", "riddle", "enigma"]})
    with pytest.raises(BadInput, match=r"config\.json has no such keys \(mistery\)"):
        read(folder)


def test_a_suite_without_items_is_refused(folder: Path) -> None:
    (folder / ".mansard/data/corpus/code-bits.jsonl").write_text("\n")
    with pytest.raises(BadInput, match="no items"):
        read(folder)


def test_a_suite_that_could_not_see_its_margin_is_refused_before_training(folder: Path) -> None:
    def checked(files: int, attempt: int) -> None:
        lines = [f'{{"id": "{n}", "file": "{n}.py", "text": "x = {n}"}}' for n in range(files)]
        (folder / ".mansard/data/corpus/docstrings-bits.jsonl").write_text("\n".join(lines) + "\n")
        order = read(folder)
        store = Store(order.site.store)
        suites = tuple((s.name, take_suite(store, s, order.site.data)) for s in order.suites)
        check_power(store, terms_of(order, suites), attempt)

    checked(120, attempt=1)
    checked(120, attempt=10)
    checked(60, attempt=1)
    with pytest.raises(BadInput, match="docstrings-bits: with 30 source files"):
        checked(30, attempt=1)
    with pytest.raises(BadInput, match="docstrings-bits: with 60 source files"):
        checked(60, attempt=5)
