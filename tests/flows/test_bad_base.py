"""Bases that are not what they say, through the command: one line, exit 2, nothing taken, nothing started."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from flows.cli import main
from mansard.site import Site
from mansard.store.store import Store

Tensors = dict[str, numpy.ndarray]
MakeCheckpoint = Callable[..., Path]


def configured(**entries: Any) -> Callable[[Path], None]:
    """Changes config.json."""

    def harm(base: Path) -> None:
        path = base / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))

    return harm


def tensors(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    """Changes the tensors of a checkpoint in one file."""

    def harm(base: Path) -> None:
        found = dict(load_file(base / "model.safetensors"))
        change(found)
        save_file(found, base / "model.safetensors", metadata={"format": "pt"})

    return harm


def in_two_files(base: Path) -> None:
    """A tensor of the second file also stands in the first, and the index knows one of them."""
    first, second = sorted(base.glob("*.safetensors"))
    doubled = next(iter(load_file(second).items()))
    save_file({**load_file(first), doubled[0]: doubled[1]}, first)


def vocabulary(base: Path) -> None:
    (base / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "storey": 32}}}))


def another_template(base: Path) -> None:
    """The suite's items were written for another model's chat."""
    items = base.parent / "corpus/code-bits.jsonl"
    items.write_text(items.read_text().replace("some text", "<|im_start|>user"))


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("shards", "harm", "words"),
    [
        (1, configured(model_type="mamba"), "model_type 'mamba'"),
        (1, configured(hiden_act="silu"), "unknown keys for llama ('hiden_act', did you mean 'hidden_act'?)"),
        (1, configured(num_local_experts=4), "unknown keys for llama ('num_local_experts'"),
        (1, configured(num_hidden_layers=3), "missing from the checkpoint, though config.json asks for it"),
        (1, tensors(lambda t: t.pop(UP)), f"tensor '{UP}' is missing from the checkpoint"),
        (1, tensors(lambda t: t.update({f"{UP}_2": t[UP]})), f"tensor '{UP}_2' is not a tensor of a llama model"),
        (1, tensors(lambda t: t.update({UP: t[UP].T.copy()})), f"tensor '{UP}' has the shape [16, 24], but"),
        (1, tensors(lambda t: t.update({UP: t[UP].astype("float32")})), f"tensor '{UP}' is F32, but"),
        (2, in_two_files, "under this file; remove the file"),
        (1, another_template, "suite code-bits: item '1' holds '<|im_start|>', a control token"),
        (1, vocabulary, "token 'storey' has the number 32, but config.json's vocab_size is 32"),
    ],
    ids=["family", "key", "experts", "depth", "missing", "extra", "shape", "type", "doubled", "template", "vocabulary"],
)
def test_a_base_that_is_not_what_it_says_is_one_line_and_exit_2(
    site: Site,
    make_checkpoint: MakeCheckpoint,
    capsys: pytest.CaptureFixture[str],
    shards: int,
    harm: Callable[[Path], None],
    words: str,
) -> None:
    make_checkpoint(depth=2, shards=shards).rename(site.data / "base")
    harm(site.data / "base")
    spec = site.path.parent.parent / "adopt/demo.yaml"
    spec.write_text(yaml.safe_dump({**yaml.safe_load(spec.read_text()), "quantize": {"scheme": "none"}}))
    assert main(["adopt", str(spec), "--site", str(site.path)]) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("mansard adopt: ") and words in told and "\n" not in told
    assert Store(site.store).snapshots() == []
