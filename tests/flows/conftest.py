"""A site that a command could run on, with nothing running."""

import shutil
from pathlib import Path

import pytest
import yaml

from flows.cli import main
from mansard.site import Site, load_site

ROOT = Path(__file__).resolve().parents[2]
LINE = '{"text": "some text", "file": "a.py"}\n'
ITEM = '{"id": "1", "file": "a.py", "text": "some text"}\n'


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A site with keys, text, suites and a base that is not there yet; nothing runs."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    path = tmp_path / "configs/site/local.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["environments"]["main"]["lock"] = str(ROOT / "infra/constraints/main.txt")
    path.write_text(yaml.safe_dump(tree))
    made = load_site(path)
    for name in ("ada", "grace"):
        assert main(["keygen", name, "--site", str(path)]) == 0
    corpus = made.data / "corpus"
    corpus.mkdir(parents=True)
    for name in ("code", "docstrings"):
        for part in ("train", "held-out"):
            (corpus / f"{name}.{part}.jsonl").write_text(LINE)
        (corpus / f"{name}-bits.jsonl").write_text(ITEM)
        choice = '"context": "x", "choices": ["a", "b", "c", "d"], "answer": 0'
        (corpus / f"{name}-next-line.jsonl").write_text(ITEM.replace('"text": "some text"', choice))
    return made
