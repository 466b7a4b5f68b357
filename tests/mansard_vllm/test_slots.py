"""What the vLLM plugin refuses of a branch's folder, in the serving environment's Python; no engine is started."""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mansard.carry_on.branch import Branch
from mansard.carry_on.branch_file import branch_bytes
from mansard.composition.description import FILE, BranchDescription
from mansard.composition.shape import BranchShape, shape_of
from mansard.demo.base import save_base, train_tokenizer, untrained_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"vocabulary": 300, "hidden": 128, "intermediate": 256, "blocks": 2, "heads": 2, "max_tokens": 128}
BASE, OTHER = "a" * 64, "b" * 64
GOOD = shape_of(128, 64, 1)
Tensors = dict[str, torch.Tensor]


def folder_of(
    at: Path,
    base: str = BASE,
    shape: BranchShape = GOOD,
    alpha: str | None = '{"alpha": 0.5}',
    change: Callable[[Tensors], Any] | None = None,
) -> str:
    """A branch as the host lays it out; `change` spoils its tensors."""
    at.mkdir()
    (branch := Branch(shape)).start(0)
    description = BranchDescription(base, shape, 1.0)
    tensors = {name: p.detach().clone() for name, p in branch.named_parameters()}
    (at / FILE).write_bytes(branch_bytes(description, tensors, torch.float32))
    if change is not None:
        change(tensors)
        save_file(tensors, at / FILE, metadata=description.metadata())
    if alpha is not None:
        (at / "alpha.json").write_text(alpha)
    return str(at)


def told(model: Path, folders: list[str]) -> list[Any]:
    run = subprocess.run(
        [ROOT / ".venv-serve/bin/python", Path(__file__).with_name("slots_in_vllm.py"), model, BASE,
         json.dumps(GOOD.as_json())],
        input=json.dumps(folders), capture_output=True, text=True, check=False, timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT / "infra/vllm-plugin"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    found: list[Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def test_a_branch_that_does_not_belong_in_a_slot_is_refused_and_the_one_in_it_stays(tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_base(untrained_model(SHAPE, 0), train_tokenizer(["a b c " * 50], SHAPE["vocabulary"], 64), model)
    gone = tmp_path / "gone"
    gone.mkdir()
    (gone / "alpha.json").write_text('{"alpha": 1}')
    short = Path(folder_of(tmp_path / "short"))
    (short / FILE).write_bytes((short / FILE).read_bytes()[:-100])
    wrong = {
        str(short): "the branch cannot be read (",
        str(gone): "the branch is not there; compose the artifact again",
        folder_of(tmp_path / "base", base=OTHER): "belongs to base bbbbbbbbbbbb, the server's is aaaaaaaaaaaa",
        folder_of(tmp_path / "width", shape=shape_of(64, 64, 1)): "a branch for width 64, the base has 128",
        folder_of(tmp_path / "shape", shape=replace(GOOD, intermediate=8)): "a branch of intermediate 8 where",
        folder_of(tmp_path / "taps", shape=shape_of(128, 64, 1, [1])): "the server's slots have taps none",
        folder_of(tmp_path / "nan", change=lambda t: t["mixer"].fill_(torch.nan)): "mixer: [128, 64] finite values",
        folder_of(tmp_path / "lacks", change=lambda t: t.pop("norm")): "tensors missing or left over, e.g. norm",
        folder_of(tmp_path / "silent", alpha=None): 'alpha.json: {"alpha": NUMBER} is expected (FileNotFoundError)',
        folder_of(tmp_path / "negative", alpha='{"alpha": -1}'): "alpha -1: a number from 0 up is expected",
        folder_of(tmp_path / "endless", alpha='{"alpha": NaN}'): "alpha nan: a number from 0 up is expected",
    }
    first, last = folder_of(tmp_path / "first"), folder_of(tmp_path / "last", alpha='{"alpha": 2}')
    begun, *refused, ended = told(model, [first, *wrong, last])
    assert begun[:4] == ["taken", [1], {"1": 1}, 0.5]
    for (words, *held), expected in zip(refused, wrong.values(), strict=True):
        assert expected in words and "\n" not in words
        assert held == begun[1:]
    number = len(wrong) + 2
    assert ended == ["taken", [1, number], {str(number): 1}, 2.0, begun[4]]
