"""The simulations of `make bench NAME=gate`, small and seeded: the bench says more exactly what these say roughly."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from mansard.evaluation.power import alpha_of_attempt
from mansard.evaluation.statistics import compare_answers, compare_means

WORLDS = 1000
ALPHA = 0.05
LIMIT = ALPHA + 3 * (ALPHA * (1 - ALPHA) / WORLDS) ** 0.5


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """bench_gate.py, which is a program and in no package."""
    spec = importlib.util.spec_from_file_location("bench_gate", Path(__file__).with_name("bench_gate.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_gate"] = module
    spec.loader.exec_module(module)
    return module


def test_simulated_bounds_are_the_librarys(bench: ModuleType) -> None:
    generator = np.random.default_rng(3)
    drawn = bench.draw_means(generator, 3, 40, 0.02, 0.05, 1)
    low, high = bench.bounds_of_means(drawn, [ALPHA], 1000)[ALPHA]
    files = [f"{n:03d}" for n in range(40)]
    for world in range(3):
        sizes = drawn.sizes[world].tolist()
        found = compare_means([0.0] * 40, drawn.differences[world].tolist(), sizes, files, ALPHA, 1000, 0).effect
        assert (found.low, found.high) == pytest.approx((low[world], high[world]), abs=2e-6)
    answers = bench.draw_answers(generator, 3, 40, 5, -0.05, 0.3, 0.2)
    low, high = bench.bounds_of_answers(answers, ALPHA)
    for world in range(3):
        before, after, names = [], [], []
        for file in range(40):
            gained, lost = int(answers.gains[world, file]), int(answers.losses[world, file])
            before += [0.0] * gained + [1.0] * (5 - gained)
            after += [1.0] * gained + [0.0] * lost + [1.0] * (5 - gained - lost)
            names += [files[file]] * 5
        found = compare_answers(before, after, names, ALPHA).effect
        assert (found.low, found.high) == pytest.approx((low[world], high[world]), abs=2e-6)


@pytest.mark.parametrize("files", [30, 60, 120])
@pytest.mark.parametrize("side", [1, -1])
def test_few_skewed_files_seldom_pass_at_the_edge_of_the_null(bench: ModuleType, files: int, side: int) -> None:
    drawn = bench.draw_means(np.random.default_rng(1), WORLDS, files, 0.02, 0.05, side)
    low, high = bench.bounds_of_means(drawn, [ALPHA], 2000)[ALPHA]
    assert np.mean(high <= 0.02) <= LIMIT
    assert bench.covered((low, high), 0.02) >= 1 - 2 * LIMIT


@pytest.mark.parametrize(("files", "items", "tied"), [(300, 1, 0.0), (60, 10, 0.1), (120, 5, 0.2)])
def test_answers_seldom_pass_at_the_edge_of_the_null(bench: ModuleType, files: int, items: int, tied: float) -> None:
    drawn = bench.draw_answers(np.random.default_rng(2), WORLDS, files, items, -0.05, 0.2, tied)
    bounds = bench.bounds_of_answers(drawn, ALPHA)
    assert np.mean(bounds[0] >= -0.05) <= LIMIT
    assert bench.covered(bounds, -0.05) >= 1 - 2 * LIMIT


def test_five_tries_of_unchanged_candidates_are_promoted_in_at_most_alpha(bench: ModuleType) -> None:
    _, gate, guard = next(iter(bench.shipped()))
    gate = gate.model_copy(update={"resamples": 4000})
    promoted, plain = bench.five_tries(np.random.default_rng(5), WORLDS, 120, guard, gate)
    assert promoted <= LIMIT < 0.15 < plain


def test_ten_upgrades_that_each_lose_half_a_margin_are_stopped(bench: ModuleType) -> None:
    _, gate, guard = next(iter(bench.shipped()))
    gate = gate.model_copy(update={"resamples": 1000})
    passed = bench.ten_half_margins(np.random.default_rng(6), 500, 120, guard, gate)
    assert np.mean(passed >= 2) <= 2 * alpha_of_attempt(gate.alpha, 1) + 0.03  # two lose the whole margin: the edge
    assert passed.max() <= 3
    assert np.mean(passed >= 1) > 0.3  # half a margin alone is allowed to pass


def test_shipped_guards_keep_the_power_that_is_planned(bench: ModuleType) -> None:
    for name, gate, guard in bench.shipped():
        level = alpha_of_attempt(gate.alpha, 1)
        plan = bench.plan_guard(guard, "bits_per_byte", 300, 120, level)
        same = bench.draw_means(np.random.default_rng(7), WORLDS, 120, 0.0, guard.expected_standard_deviation, 1)
        power = np.mean(bench.bounds_of_means(same, [level], 2000)[level][1] <= guard.margin)
        assert plan.power >= 0.8 and power >= plan.power - 0.05, name
