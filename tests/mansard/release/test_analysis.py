"""The permutation test over sticky keys: its level, what it sees, and what it must not be fooled by."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mansard.release.analysis import METRICS, MIN_KEYS, Finding, Limits, Sample, judge, overall
from mansard.release.tenants import location, tenants_of

LIMITS = Limits(0.01, dict.fromkeys(("first_token", "per_token", "request"), 1.2), 2.0)
ROW = {metric.name: row for row, metric in enumerate(METRICS)}


def sample(seed: int, num_canary: int = 75, num_stable: int = 225) -> Sample:
    """Keys with few and many requests, slow and fast ones, and a past; both sides alike."""
    rng = np.random.default_rng(seed)
    num_keys = num_canary + num_stable
    counts = np.ceil(rng.pareto(1.0, num_keys) * 3 + 1)
    past = counts * 5
    speed = rng.lognormal(0.0, 0.6, num_keys)
    rows, past_rows = [], []
    for metric in METRICS:
        if metric.is_ratio:
            rows.append(counts * speed * rng.lognormal(0.0, 0.4 / np.sqrt(counts)))
            past_rows.append(past * speed * rng.lognormal(0.0, 0.4 / np.sqrt(past)))
        else:
            rows.append(rng.binomial(counts.astype(int), 0.02).astype(float))
            past_rows.append(rng.binomial(past.astype(int), 0.02).astype(float))
    shape = (len(METRICS), 1)
    is_canary = rng.permutation(np.arange(num_keys) < num_canary)
    return Sample(is_canary, np.array(rows), np.tile(counts, shape), np.array(past_rows), np.tile(past, shape))


def changed(found: Sample, name: str, factor: float) -> Sample:
    """The canary's keys with a metric multiplied."""
    sums = found.sums_MK.copy()
    sums[ROW[name]] *= np.where(found.is_canary if found.is_canary is not None else True, factor, 1.0)
    return replace(found, sums_MK=sums)


def of(findings: tuple[Finding, ...], name: str) -> Finding:
    return next(f for f in findings if f.metric == name)


def test_alike_versions_pass_every_metric() -> None:
    findings = judge(sample(1), LIMITS, 0.01, seed=1)
    assert [f.metric for f in findings] == [metric.name for metric in METRICS]
    assert {f.verdict for f in findings if f.metric != "errors"} == {"pass"}
    assert overall(findings) != "fail"


@pytest.mark.parametrize("name", ["first_token", "per_token", "request"])
def test_a_slow_canary_fails_by_that_metric(name: str) -> None:
    findings = judge(changed(sample(2), name, 1.8), LIMITS, 0.01, seed=1)
    assert [f.metric for f in findings if f.verdict == "fail"] == [name]
    finding = of(findings, name)
    assert 1.2 < finding.interval[0] < finding.estimate < finding.interval[1]
    assert "1.20x" in finding.text()


@pytest.mark.parametrize("factor", [3.0, 1 / 3])
def test_answers_that_grow_or_shrink_fail(factor: float) -> None:
    assert of(judge(changed(sample(3), "output", factor), LIMITS, 0.01, seed=1), "output").verdict == "fail"


def test_a_canary_that_fails_more_fails() -> None:
    found = sample(4)
    more = np.random.default_rng(0).binomial(found.counts_MK[0].astype(int), 0.10)
    sums = found.sums_MK.copy()
    sums[0] = np.minimum(sums[0] + np.where(found.is_canary, more, 0), found.counts_MK[0])
    assert of(judge(replace(found, sums_MK=sums), LIMITS, 0.01, seed=1), "errors").verdict == "fail"


def test_a_cost_that_a_person_approved_is_no_fault() -> None:
    slow = changed(sample(5), "request", 1.5)
    assert of(judge(slow, LIMITS, 0.01, seed=1), "request").verdict == "fail"
    approved = replace(LIMITS, slower={**LIMITS.slower, "request": 1.5 * 1.2})
    assert of(judge(slow, approved, 0.01, seed=1), "request").verdict == "pass"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, MIN_KEYS - 1))
def test_too_few_users_are_inconclusive_whatever_they_see(seed: int, few: int) -> None:
    for sizes in ((few, 200), (200, few)):
        findings = judge(changed(sample(seed, *sizes), "request", 50.0), LIMITS, 0.05, seed=1)
        assert {f.verdict for f in findings} == {"inconclusive"}
        assert "30 on each side" in findings[0].text()


def test_a_metric_that_few_users_have_stands_in_nobodys_way() -> None:
    found = sample(10)
    counts = found.counts_MK.copy()
    counts[ROW["first_token"], 20:] = 0
    findings = judge(replace(found, counts_MK=counts), replace(LIMITS, max_error_excess=0.5), 0.01, seed=1)
    assert of(findings, "first_token").verdict == "inconclusive"
    assert overall(findings) == "pass"
    assert overall(tuple(f for f in findings if f.metric != "request")) == "inconclusive"


def test_a_look_that_spends_nothing_cannot_fail() -> None:
    findings = judge(changed(sample(6), "request", 50.0), LIMITS, 0.0, seed=1)
    assert of(findings, "request").verdict == "inconclusive"
    assert overall(findings) == "inconclusive"


def test_one_heavy_user_who_fails_always_fails_nobody_else() -> None:
    """The unit is the user: a thousand failures of one are one observation."""
    found = sample(7)
    assert found.is_canary is not None
    heavy = int(np.flatnonzero(found.is_canary)[0])
    sums, counts = found.sums_MK.copy(), found.counts_MK.copy()
    counts[0, heavy] = sums[0, heavy] = 1000.0
    assert of(judge(replace(found, sums_MK=sums, counts_MK=counts), LIMITS, 0.01, seed=1), "errors").verdict != "fail"


def test_users_who_were_slow_before_are_not_the_canarys_fault() -> None:
    found = sample(8)
    burden = np.where(found.is_canary, 1.3, 1.0)
    both = replace(found, sums_MK=found.sums_MK * burden, past_sums_MK=found.past_sums_MK * burden)
    sums, past = both.sums_MK.copy(), both.past_sums_MK.copy()
    sums[0], past[0] = found.sums_MK[0], found.past_sums_MK[0]
    findings = judge(replace(both, sums_MK=sums, past_sums_MK=past), LIMITS, 0.01, seed=1)
    assert {f.verdict for f in findings if f.metric in LIMITS.slower} == {"pass"}


def test_at_all_of_the_traffic_each_user_is_compared_with_itself() -> None:
    alone = replace(sample(9), is_canary=None)
    assert {f.verdict for f in judge(alone, LIMITS, 0.01, seed=1) if f.metric in LIMITS.slower} == {"pass"}
    assert of(judge(changed(alone, "request", 1.8), LIMITS, 0.01, seed=1), "request").verdict == "fail"


def test_no_data_is_no_pass() -> None:
    nothing = np.zeros((len(METRICS), 0))
    empty = Sample(np.zeros(0, dtype=bool), nothing, nothing, nothing, nothing)
    assert judge(empty, LIMITS, 0.05, seed=1) == ()
    assert overall(()) == "inconclusive"


def test_the_level_holds_at_the_limit_itself() -> None:
    """Without tolerance, where it is tight: 200 alike samples at 20 % fail at most 29 % of the time (3 errors)."""
    tight = Limits(0.0, dict.fromkeys(LIMITS.slower, 1.0), 1.0001)
    fails = sum(overall(judge(sample(seed), tight, 0.2, seed)) == "fail" for seed in range(200))
    assert 0 < fails <= 58


def with_crowd(found: Sample, number: int, name: str, on_canary: float, on_stable: float) -> Sample:
    """Ten tenants' users, and an eleventh's invented ones with these values of a metric."""
    rng = np.random.default_rng(5)
    assert found.is_canary is not None
    is_canary = rng.random(number) < 0.25
    counts = np.full((len(METRICS), number), 20.0)
    usual = found.sums_MK.sum(axis=1) / found.counts_MK.sum(axis=1)
    sums, past = counts * usual[:, None], counts * usual[:, None]
    sums[ROW[name]] = counts[0] * np.where(is_canary, on_canary, on_stable)
    honest = rng.integers(0, 10, len(found.is_canary))
    return Sample(
        np.append(found.is_canary, is_canary),
        np.append(found.sums_MK, sums, axis=1),
        np.append(found.counts_MK, counts, axis=1),
        np.append(found.past_sums_MK, past, axis=1),
        np.append(found.past_counts_MK, counts, axis=1),
        np.append(honest, np.full(number, 10)),
    )


def test_a_crowd_that_one_tenant_invents_votes_no_canary_down() -> None:
    hostile = with_crowd(sample(1), 200, "output", 60.0, 4.0)
    assert of(judge(replace(hostile, tenant_K=None), LIMITS, 0.01, seed=1), "output").verdict == "fail"
    finding = of(judge(hostile, LIMITS, 0.01, seed=1), "output")
    assert finding.verdict == "pass" and "of 11 tenants" in finding.text()


def test_a_crowd_that_one_tenant_invents_helps_no_slow_canary() -> None:
    hostile = with_crowd(changed(sample(2), "request", 1.8), 2000, "request", 0.01, 10.0)
    assert of(judge(replace(hostile, tenant_K=None), LIMITS, 0.01, seed=1), "request").verdict == "pass"
    assert of(judge(hostile, LIMITS, 0.01, seed=1), "request").verdict == "fail"


def test_a_tenant_beside_whom_there_is_nobody_counts_in_full_and_the_words_say_so() -> None:
    slow = changed(sample(2), "request", 1.8)
    alone = of(judge(slow, LIMITS, 0.01, seed=1), "request")
    assert alone.verdict == "fail" and "of one tenant, whose users nobody else confirms" in alone.text()
    nearly = replace(slow, tenant_K=np.where(np.arange(300) < 3, np.arange(300), 99))
    finding = of(judge(nearly, LIMITS, 0.01, seed=1), "request")
    assert finding.verdict == "fail" and "of 4 tenants, of which one has nearly all" in finding.text()


@given(st.integers(3, 12), st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_no_tenant_moves_a_location_by_more_than_its_bound(number: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values, tenant = rng.normal(size=400), rng.integers(0, number, 400)
    tenants = tenants_of(tenant, 400)
    weights = np.ones(400)
    moved = [location(np.where(tenant == 0, far, values), weights, tenants)[0] for far in (-1e6, 1e6)]
    assert -1.0 < moved[0] < moved[1] < 1.0
