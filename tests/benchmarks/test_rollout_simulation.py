"""The simulations of `make bench NAME=rollout`, small and seeded:
the bench says more exactly what these say roughly."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from mansard.release.analysis import METRICS


def program(name: str) -> ModuleType:
    """One of this folder, which is in no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return program("bench_rollout")


def test_identical_versions_are_rarely_aborted_and_mostly_promoted(bench: ModuleType) -> None:
    plan = bench.plan([25, 50, 100], bench.BAKE_SECONDS, bench.DEADLINE_SECONDS)
    ended = [bench.walk(seed, plan, bench.Harm(), bench.DEADLINE_SECONDS).phase for seed in range(30)]
    assert ended.count("promoted") >= 26
    assert ended.count("promoted") + ended.count("aborted") == 30


@pytest.mark.parametrize("harm", [{"more_errors": 0.05}, {"slower": 1.5}])
def test_harm_is_seen_within_half_a_minute(bench: ModuleType, harm: dict[str, float]) -> None:
    plan = bench.plan([25, 50, 100], 1e9, bench.DETECT_DEADLINE_SECONDS)
    found = [bench.walk(seed, plan, bench.Harm(**harm), 31.0, 20.0) for seed in range(20)]
    assert bench.rates(found, 30.0) >= 0.85


def test_what_the_population_tells_adds_up(bench: ModuleType) -> None:
    rng = np.random.default_rng(1)
    people = bench.People.draw(rng)
    requests = bench.requests_between(rng, 0.0, 60.0, people)
    sums, counts = bench.sums(requests, 1e9)
    names = [metric.name for metric in METRICS]
    assert counts[names.index("refused")].sum() == len(requests.at)
    assert counts[names.index("errors")].sum() == len(requests.at) - requests.refused.sum()
    assert sums[names.index("errors")].sum() == requests.failed.sum()
    assert counts[names.index("request")].sum() == (~requests.failed & ~requests.refused).sum()
    half, full = bench.sums(requests, 30.0)[1], counts
    assert (half[names.index("errors")] <= full[names.index("errors")]).all()


def test_one_hostile_tenant_of_ten_changes_next_to_no_decision(bench: ModuleType) -> None:
    assert program("bench_forged").forged_decisions(seed=100, worlds=16) <= 1 / 16
