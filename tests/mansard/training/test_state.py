"""A checkpoint is what it was when it was asked for, whole or not there, and a failure to write is not lost."""

from pathlib import Path

import pytest
import torch

from mansard.training.state import Checkpoints, Cursor


def test_what_moves_after_the_call_is_not_in_the_checkpoint(tmp_path: Path) -> None:
    checkpoints, weight = Checkpoints(tmp_path), torch.zeros(100_000)
    for step in range(1, 4):
        weight.fill_(step)
        checkpoints.write(Cursor(step), {"master/w": weight})
        weight.fill_(-1.0)
    found = checkpoints.read()
    assert found is not None and found[0].step == 3
    assert found[1]["master/w"].eq(3.0).all()


def test_a_tensor_that_comes_later_is_written_too(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(Cursor(1), {"master/w": torch.zeros(3)})
    checkpoints.write(Cursor(2), {"master/w": torch.ones(3), "exp_avg/w": torch.ones(3)})
    found = checkpoints.read()
    assert found is not None and found[1].keys() == {"master/w", "exp_avg/w"}


def test_half_a_checkpoint_is_never_read(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(Cursor(1), {"master/w": torch.ones(3)})
    checkpoints.wait()
    (tmp_path / ".checkpoint.safetensors.new").write_bytes(b"half")  # what a killed writer leaves
    found = Checkpoints(tmp_path).read()
    assert found is not None and found[0].step == 1
    checkpoints.write(Cursor(2), {"master/w": torch.ones(3)})
    checkpoints.wait()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_a_checkpoint_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "file" / "work")
    (tmp_path / "file").write_text("in the way")
    checkpoints.write(Cursor(1), {"master/w": torch.ones(3)})
    with pytest.raises(OSError, match="file"):
        checkpoints.wait()
