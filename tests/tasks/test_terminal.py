import pytest

from tasks.terminal import stage_progress


def test_without_a_terminal_each_tenth_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with stage_progress() as report:
        for done in range(0, 1001, 5):
            report("train", {"done": done, "total": 1000, "unit": "tokens", "text": "loss 2.000"})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[5] == "train: 500/1,000 tokens loss 2.000"


def test_stages_beside_each_other_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    with stage_progress(has_bar=False) as report:
        report("train", {"done": 1, "total": 2, "unit": "steps", "text": ""})
        report("prove", {"done": 0, "total": 0, "unit": "loads", "text": "base"})
        report("train", {"done": 1, "total": 2, "unit": "steps", "text": ""})
    assert capsys.readouterr().err.splitlines() == ["train: 1/2 steps", "prove: 0/1 loads base"]
