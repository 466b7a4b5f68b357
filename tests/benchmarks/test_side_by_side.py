"""Trainings that run side by side find what they find one after the other; one that fails, or a deadline, ends it and
loses nothing that is done."""

import importlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module


@pytest.fixture
def side_by_side(load: Any, tmp_path: Path) -> Iterator[ModuleType]:
    module: ModuleType = load("side_by_side")
    module.stand_on(tmp_path, lambda: {"first": 7})
    return module


def test_a_failure_keeps_what_is_done_and_what_was_found_is_not_run_again(
    side_by_side: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TypeError), side_by_side.Trainings(tmp_path, dict, 2) as trainings:
        trainings.ahead(("seven", dict.copy), ("none", dict.copy, "too many"), ("late", dict.copy))
        assert trainings.of("seven", dict.copy) == {"first": 7}
        trainings.of("none", dict.copy, "too many")
    assert "none: failed: TypeError" in capfd.readouterr().err
    kept = json.loads((tmp_path / side_by_side.RUNS).read_text())
    assert kept["seven"] == {"first": 7} and "none" not in kept
    with side_by_side.Trainings(tmp_path, dict) as again:
        assert again.of("seven", dict.copy, "would fail") == {"first": 7}


@pytest.mark.parametrize("jobs", [1, 2])
def test_after_the_deadline_no_training_begins(
    side_by_side: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], jobs: int
) -> None:
    with side_by_side.Trainings(tmp_path, dict) as trainings:
        trainings.of("early", dict.copy)
    with pytest.raises(SystemExit) as ended, side_by_side.Trainings(tmp_path, dict, jobs, time.monotonic()) as late:
        late.each(lambda name: late.of(name, dict.copy), ["early", "late"])
    assert ended.value.code == side_by_side.OUT_OF_TIME == 3
    assert "out of time: 1 runs are kept" in capsys.readouterr().err
    with side_by_side.Trainings(tmp_path, dict, jobs, math.inf) as again:
        assert again.each(lambda name: again.of(name, dict.copy), ["early", "late"]) == [{"first": 7}] * 2


def test_a_failure_is_told_before_what_only_ran_out_of_time(side_by_side: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(TypeError), side_by_side.Trainings(tmp_path, dict, 2) as trainings:
        trainings.each(lambda more: trainings.of(f"{more}", dict.copy, *more), [(), ("too many",), ("again",), (1,)])


def test_another_ground_forgets_what_was_found(side_by_side: ModuleType, tmp_path: Path) -> None:
    with side_by_side.Trainings(tmp_path, dict) as trainings:
        trainings.of("seven", dict.copy)
    side_by_side.stand_on(tmp_path, lambda: {"first": 8})
    assert (tmp_path / side_by_side.RUNS).exists(), "the same ground is not made again"
    (tmp_path / side_by_side.GROUND).unlink()
    side_by_side.stand_on(tmp_path, lambda: {"first": 8})
    assert not (tmp_path / side_by_side.RUNS).exists()


def kept_runs(work: Path) -> dict[str, Any]:
    (file,) = work.rglob("runs.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def without_seconds(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: without_seconds(value) for key, value in found.items() if "seconds" not in key}
    return [without_seconds(value) for value in found] if isinstance(found, list) else repr(found)


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def check_reasoning(report: dict[str, Any]) -> None:
    """What the small form of `make bench NAME=carry-on-reasoning` tells."""
    branch = report["ways"]["branch"]
    assert branch["file_bytes"] >= 2 * branch["parameters"]
    for found in (report["before"]["asked_alike"], *branch["after"]):
        assert 0.0 <= found["low"] <= found["exact_match"] <= found["high"] <= 1.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("carry_on_reasoning", ["--base", "chains"]),
        pytest.param("carry_on_reasoning", [], marks=pytest.mark.campaign),
        pytest.param("carry_on_taps", ["--forms", "even"], marks=pytest.mark.campaign),
    ],
)
def test_runs_side_by_side_find_the_same_and_go_on_after_a_deadline(
    load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], program: str, arguments: list[str]
) -> None:
    """Both stand on one ground: it is made by what is killed by its deadline first. One of the four programs in every
    run of the tests, another in `make campaigns` (efficacy takes four minutes so): they share what runs them."""
    benchmark: ModuleType = load(program)
    work = tmp_path / "work"
    arguments = ["--device", "cpu", "--small", *arguments, "--work", str(work)]
    with pytest.raises(SystemExit) as ended:
        benchmark.main([*arguments, "--deadline", "0"])
    assert ended.value.code == 3
    assert benchmark.main(arguments) == 0
    if program == "carry_on_reasoning":
        check_reasoning(last_line(capsys))
    one_by_one = kept_runs(work)
    next(work.rglob("runs.json")).unlink()
    assert benchmark.main([*arguments, "--jobs", "2"]) == 0
    beside = kept_runs(work)
    paces = {name for name in one_by_one if name.startswith("pace/")}
    assert set(beside) == set(one_by_one) and len(one_by_one) > len(paces)
    assert without_seconds({n: beside[n] for n in set(beside) - paces}) == without_seconds(
        {n: one_by_one[n] for n in set(beside) - paces}
    )
