"""The small form of `make bench NAME=carry-on-learning`,
and what it and `make bench NAME=carry-on-reasoning` compute with (the
latter's small form: tests/benchmarks/test_side_by_side.py)."""

import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A benchmark's module by its name: they are programs, in no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


@pytest.mark.slow
def test_every_way_learns_the_same_tokens_with_as_many_parameters(
    load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark: ModuleType = load("carry_on_learning")
    assert benchmark.main(["--device", "cpu", "--small", "--output", str(tmp_path)]) == 0
    report = last_line(capsys)
    ways, before = report["ways"], report["base"]["bits_per_byte"]["code"]
    assert 0.9 < ways["branch"]["parameters"] / ways["lora"]["parameters"] < 1.1
    assert all(way["final_loss"]["mean"] < before for way in ways.values())
    assert all(way["final_loss"]["mean"] < way["area_tokens"]["mean"] < before for way in ways.values())
    assert set(report["claim"]) == {"tokens", "seconds", "node_seconds"}
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert {point["tokens"] for runs in curves.values() for run in runs for point in run} == {
        point["tokens"] for point in curves["full"][0]
    }
    last = curves["branch"][0][-1]["bits_per_byte"]
    chosen_by = ways["branch"]["rates_tried"].values()
    assert last[benchmark.CHOOSING] in chosen_by and last["code"] not in chosen_by
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_branch_of_the_reasoning_benchmark_has_a_megabyte(load: Any) -> None:
    benchmark: ModuleType = load("carry_on_reasoning")
    shape = load("mansard.composition.shape").shape_of_size(benchmark.LARGE.model["hidden"], benchmark.PARAMETERS)
    assert 0.9e6 < 2 * shape.parameters <= 1e6


def test_every_worked_step_is_right_and_the_last_one_is_the_answer(load: Any) -> None:
    arithmetic: ModuleType = load("worked_arithmetic")
    made = arithmetic.problems(300, 1)
    for problem in made:
        assert eval(problem.expression) == problem.answer == arithmetic.answer_in(problem.solution)
        sides = [re.fullmatch(r"(\d+[-+*]\d+)=(\d+)", step).groups() for step in problem.steps]  # type: ignore[union-attr]
        assert all(eval(left) == int(right) for left, right in sides)
    for found in re.findall(r"(\d+[-+*]\d+)=(\d+)", "".join(arithmetic.known_lines(600, 0, True, []))):
        assert eval(found[0]) == int(found[1])


def test_a_base_has_seen_no_chain_that_it_is_asked(load: Any) -> None:
    arithmetic: ModuleType = load("worked_arithmetic")
    asked = arithmetic.problems(5000, 1)
    chains = {arithmetic.chain_line(p) for p in asked}
    assert chains & set(arithmetic.known_lines(5000, 0, True, []))
    assert not chains & set(arithmetic.known_lines(5000, 0, True, asked))
    problem = arithmetic.Problem("((7+12)*3)", ("7+12=19", "19*3=57"), 57)
    assert arithmetic.chain_line(problem) == "7 +12 *3 -> 7+12=19, 19*3=57\n"


def test_problems_asked_are_in_no_sample(load: Any) -> None:
    arithmetic: ModuleType = load("worked_arithmetic")
    worked = arithmetic.problems(500, 1)
    asked = arithmetic.problems(500, 1, without=worked)
    assert not {p.expression for p in worked} & {p.expression for p in asked}
    assert len({p.expression for p in asked}) == 500


def test_only_the_answer_of_a_sample_is_learned(load: Any) -> None:
    benchmark, arithmetic = load("carry_on_reasoning"), load("worked_arithmetic")
    tokenizer = load("mansard.demo.base").train_tokenizer(["text"], benchmark.CHARACTERS, 512)
    worked = arithmetic.problems(8, 1)
    batch = benchmark.Samples(worked, tokenizer, 8, 0).batch(0)
    learned = {tokenizer.decode(row[row >= 0]) for row in batch.labels_BT}
    assert learned == {p.solution for p in worked}
    shifted = batch.tokens_BT[:, 1:][batch.labels_BT[:, :-1] >= 0]
    assert torch.equal(shifted, batch.labels_BT[batch.labels_BT >= 0])


def test_a_curve_that_falls_sooner_has_the_smaller_area(load: Any) -> None:
    curves, ways = load("learning_curves"), load("ways_of_learning")

    def curve(losses: list[float]) -> list[Any]:
        return [ways.Point(100 * i, 2.0 * i, 0.5 * i, 0.0, {"code": loss}) for i, loss in enumerate(losses)]

    tokens, node = curves.AXES["tokens"], curves.AXES["node_seconds"]
    soon, late = curve([3.0, 1.0, 1.0]), curve([3.0, 3.0, 1.0])
    assert curves.area(soon, tokens, 200.0) == pytest.approx(1.5)
    assert curves.area(late, tokens, 200.0) == pytest.approx(2.5)
    assert curves.area(late, node, 1.5) == pytest.approx(3.0)
    assert curves.reached(soon, tokens, 2.0) == pytest.approx(50.0)
    assert curves.reached(late, node, 2.0) == pytest.approx(2.25)


def test_the_claim_follows_the_intervals(load: Any) -> None:
    curves: ModuleType = load("learning_curves")
    areas = {"branch": [1.0, 1.1, 1.05], "lora": [2.0, 2.1, 2.06], "full": [3.0, 3.1, 3.04]}

    def claimed(**changed: list[float]) -> str:
        found = areas | changed
        return str(curves.claim({rival: curves.beside_rival(found, rival) for rival in ("lora", "full")}))

    assert claimed() == "confirmed"
    assert claimed(full=[0.5, 0.6, 0.54]) == "refuted: slower than full"
    assert claimed(lora=[0.5, 2.1, 1.0]) == "not decided"


def test_a_best_rate_at_the_edge_is_looked_beyond(load: Any) -> None:
    ways: ModuleType = load("ways_of_learning")
    tried, best, result = ways.choose_rate((1e-3, 3e-3), 5, lambda rate: (abs(rate - 0.02), f"{rate:.3f}"))
    assert list(tried) == pytest.approx([1e-3, 3e-3, 9e-3, 0.027, 0.081])
    assert (best, result) == (pytest.approx(0.027), "0.027")
    assert len(ways.choose_rate((1e-3, 3e-3), 3, lambda rate: (-rate, None))[0]) == 3
