"""Progress is shown on every kind of standard error, and none of them ends the work that it tells of."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from tasks.progress_bars import Row, line_of
from tasks.progress_reading import reading
from tasks.terminal import stage_progress
from tests.terminal import Shown, run_in_terminal

WORK = """
import sys
from tasks.terminal import say, stage_progress
with stage_progress() as report:
    report("prove", {"done": 0, "total": None, "unit": "", "text": "starting"})
    report("prove", {"done": 3, "total": 0, "unit": "loads", "text": "base"})
    for done in range(0, 1_000_001, 1000):
        text = "loss 2.345, and more than a terminal of forty columns could ever show" if done > 5000 else "loss 2.345"
        report("train", {"done": done, "total": 1_000_000, "unit": "tokens", "text": text, "metrics": {}})
    say("a line beside the bars")
    for odd in ({}, {"done": None}, {"done": "many", "total": "all"}, {"done": float("nan"), "total": 10**400}, None, 7,
                {"done": -1, "total": -1, "unit": None, "text": ["\\x1b[2J", "\\n"]}):
        report("odd", odd)
print("work is complete")
"""
"""What a stage may tell, and worse."""


def ran(**how: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", WORK], text=True, stdout=subprocess.PIPE, **how)


def ran_in_terminal(columns: int, **variables: str) -> Shown:
    result = run_in_terminal([sys.executable, "-c", WORK], columns, variables=variables)
    assert result.status == 0 and "Traceback" not in result.output, result.output
    assert result.lines()[-2:] == ["work is complete", ""]
    return result


@pytest.mark.parametrize("columns", [20, 40, 80, 120])
def test_a_terminal_shows_one_line_a_stage_that_fits(columns: int) -> None:
    result = ran_in_terminal(columns)
    assert result.widest() <= columns
    prove, train = (next(x for x in result.lines() if x.startswith(name) and ":" not in x[:12]) for name in BARS)
    assert "%" in train if columns < 60 else "1,000,000/1,000,000 tokens" in train
    assert columns < 40 or ("━" in train and "0:0" in train)
    assert columns < 40 or "3 loads" in prove
    assert "\x1b[2J" not in result.output


BARS = ("prove", "train")


def test_a_bar_without_a_total_moves_before_the_stage_counts() -> None:
    code = """
import sys, time
from tasks.terminal import stage_progress
with stage_progress() as report:
    report("prove", {"done": 0, "total": None, "unit": "", "text": "starting"})
    sys.stdin.read()
"""
    reader, writer = os.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=writer)
    frames: set[bytes] = set()
    try:
        while len(frames) < 3:
            frames |= {part for part in os.read(reader, 1 << 16).split(b"\r") if "━".encode() in part}
        process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
        os.close(writer)
        os.close(reader)


def test_a_terminal_without_colour_gets_none() -> None:
    result = ran_in_terminal(80, NO_COLOR="1")
    assert "\x1b[3" not in result.output and "\x1b[9" not in result.output
    assert "1,000,000/1,000,000 tokens" in result.output


def test_a_dumb_terminal_gets_lines() -> None:
    result = ran_in_terminal(80, TERM="dumb")
    assert "\x1b" not in result.output
    assert "train: 500,000/1,000,000 tokens loss" in result.output


def test_a_closed_standard_error_ends_nothing_and_moves_nothing_to_standard_output() -> None:
    result = ran(preexec_fn=lambda: os.close(2))
    assert (result.returncode, result.stdout) == (0, "work is complete\n")


@pytest.mark.parametrize("is_terminal", [False, True], ids=["pipe", "terminal"])
def test_a_standard_error_whose_reader_went_away_ends_nothing(is_terminal: bool) -> None:
    reader, writer = os.openpty() if is_terminal else os.pipe()
    os.close(reader)
    try:
        result = ran(stderr=writer)
    finally:
        os.close(writer)
    assert (result.returncode, result.stdout) == (0, "work is complete\n")


def test_a_full_disk_below_standard_error_ends_nothing() -> None:
    with Path("/dev/full").open("wb") as full:
        result = ran(stderr=full)
    assert (result.returncode, result.stdout) == (0, "work is complete\n")


def test_without_a_terminal_each_tenth_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with stage_progress() as report:
        for step in range(0, 1001, 5):
            report("train", {"done": step, "total": 1000, "unit": "tokens", "text": "loss 2.000"})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[5] == "train: 500/1,000 tokens loss 2.000"


def test_without_a_total_a_line_comes_as_often_as_the_count_doubles(capsys: pytest.CaptureFixture[str]) -> None:
    with stage_progress() as report:
        for step in range(1000):
            report("train", {"done": step, "total": None, "unit": "steps", "text": ""})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["0", "1", "2", "4", "8", "16", "32", "64", "128", "256", "512"]


def test_stages_beside_each_other_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    with stage_progress(has_bar=False) as report:
        report("train", {"done": 1, "total": 2, "unit": "steps", "text": ""})
        report("prove", {"done": 0, "total": 0, "unit": "loads", "text": "base"})
        report("train", {"done": 1, "total": 2, "unit": "steps", "text": ""})
    assert capsys.readouterr().err.splitlines() == ["train: 1/2 steps", "prove: 0 loads base"]


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=2)
)


@given(st.dictionaries(st.sampled_from(["done", "total", "unit", "text", "metrics"]), anything) | anything)
def test_whatever_a_stage_reports_can_be_read(progress: Any) -> None:
    read = reading(progress)
    assert read.completed >= 0 and (read.total is None or read.total > 0)
    assert 0 <= read.percent <= 100
    assert read.text.isprintable() and read.unit.isprintable() and json.dumps(read.metrics, allow_nan=False)


@given(
    st.dictionaries(st.sampled_from(["done", "total", "unit", "text"]), anything),
    st.dictionaries(st.sampled_from(["done", "total", "unit", "text"]), anything),
    st.floats(0, 1e9),
    st.integers(1, 200),
)
def test_whatever_a_stage_reports_fits_its_line(first: Any, then: Any, seconds: float, columns: int) -> None:
    row = Row("quantize", reading(then), 0.0, 0.0, reading(first).completed)
    line = line_of(row, seconds, columns)
    assert cell_len(line.before) + line.bar + cell_len(line.after) <= columns


def test_an_end_farther_off_than_any_number_is_not_told() -> None:
    row = Row("train", reading({"done": 5, "total": 1e308}), 0.0, 0.0, 0.0)
    assert "to go" not in line_of(row, 1e9, 200).after
