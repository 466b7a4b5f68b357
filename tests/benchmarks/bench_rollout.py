"""False aborts and detection of the rollout's analysis: simulated users, the real state machine and analysis.

`make bench NAME=rollout`; nine to fourteen minutes on two busy cores (2026-11-26).
False aborts: whole rollouts (25, 50,
100 %) of identical versions, all metrics, looks and steps together, evaluation having measured ratios of exactly 1, the
spec's default tolerances. The `edge` repeats it with no tolerance at all, where the test itself has to keep its level.
Detection: one step at 25 %, 20 requests/s reaching the canary. Smaller weights and a slower tail are printed with the
time to 95 %. The last line is JSON: false_abort_rate, limit (5 % and three Monte-Carlo standard errors),
errors_caught_in_30s, latency_caught_in_30s.
Not covered: the controller's own time (a look is taken within half a second of when it is due).
"""

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from sys import path as import_path

import numpy as np

from mansard.release.analysis import Limits, judge
from mansard.release.looks import ALPHA, look_seconds
from mansard.release.rollout import Look, Observation, Plan, SetWeight, State, Step, advance, counted_run
from mansard.specs.release import Release

import_path.insert(0, str(Path(__file__).parent))
from rollout_population import (
    NUM_USERS,
    PAST_SECONDS,
    REQUESTS_PER_SECOND,
    Harm,
    People,
    Requests,
    harmed,
    requests_between,
    sample,
    sums,
)

TICK_SECONDS = 0.5
BAKE_SECONDS = 60.0
DEADLINE_SECONDS = 600.0
DETECT_DEADLINE_SECONDS = 3600.0
"""Of the step in which harm is looked for: ten looks, the production default."""
DEFAULTS = Release.model_validate({"steps": [{"weight_percent": 25, "bake_seconds": 0, "min_requests": 1}]})


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a simulated rollout ended, in which second of its last step."""

    phase: str
    seconds: float
    reason: str


def plan(weights: Sequence[int], bake_seconds: float, deadline_seconds: float, has_tolerance: bool = True) -> Plan:
    tolerance = DEFAULTS.latency_tolerance if has_tolerance else 1.0
    slower = dict.fromkeys(("first_token", "per_token", "request"), tolerance)
    limits = Limits(
        DEFAULTS.max_error_excess if has_tolerance else 0.0,
        slower,
        DEFAULTS.output_tolerance if has_tolerance else 1.0,
    )
    return Plan(tuple(Step(w, bake_seconds, 200, deadline_seconds) for w in weights), limits)


def consecutive_failures(requests: Requests, ours: np.ndarray, at: float) -> int:
    """The longest run of failures among what the canary finished by `at`, as the host counts it."""
    done = ours & (requests.at + requests.whole <= at)
    order = np.argsort((requests.at + requests.whole)[done])
    longest, run, num_tenants = 0, Counter[int](), len(set(requests.tenant))
    for failed, tenant in zip(requests.failed[done][order], requests.tenant[requests.user[done][order]], strict=True):
        if not failed:
            run.clear()
            continue
        run[int(tenant)] += 1
        longest = max(longest, counted_run(run.values(), num_tenants))
    return longest


def walk(
    seed: int,
    chosen: Plan,
    harm: Harm,
    until_seconds: float,
    canary_requests_per_second: float | None = None,
    num_tenants: int = 1,
) -> Outcome:
    """One rollout from its first step to its end, or until a step has lasted `until_seconds`.

    Users send REQUESTS_PER_SECOND together, or so much that `canary_requests_per_second` reach the canary.
    """
    rng = np.random.default_rng(seed)
    people = People.draw(rng, num_tenants=num_tenants)
    if canary_requests_per_second is not None:
        reaching = people.rates[people.bucket < chosen.steps[0].weight_percent].sum()
        people = replace(people, rates=people.rates * canary_requests_per_second / reaching)
    history = requests_between(rng, -PAST_SECONDS, 0.0, people)
    past = on_stable = sums(history, 0.0)
    state, actions = advance(State(chosen), Observation(is_ready=True))
    while not state.is_over:
        assert isinstance(actions[0], SetWeight)
        weight = actions[0].weight_percent
        is_canary = people.bucket < weight
        new = requests_between(rng, 0.0, min(until_seconds, chosen.steps[state.step].deadline_seconds), people)
        new = harmed(new, is_canary, harm, rng)
        before = on_stable if weight == 100 else past
        state, actions, at = bake(state, new, before, is_canary, until_seconds, seed)
        stayed = sums(new, at)
        on_stable = (
            on_stable[0] + np.where(is_canary, 0.0, stayed[0]),
            on_stable[1] + np.where(is_canary, 0.0, stayed[1]),
        )
        if not actions:
            return Outcome("undecided", at, "")
    return Outcome(state.phase, at, state.reason)


def bake(
    state: State,
    requests: Requests,
    past: tuple[np.ndarray, np.ndarray],
    is_canary: np.ndarray,
    until_seconds: float,
    seed: int,
) -> tuple[State, tuple[object, ...], float]:
    """One step, tick by tick, until the machine leaves it."""
    ours = is_canary[requests.user]
    ends = np.sort((requests.at + requests.whole)[ours])
    is_all, at, findings = bool(is_canary.all()), 0.0, None
    while at < until_seconds:
        at += TICK_SECONDS
        # Looking for a run of failures costs more than all the rest: only where the machine looks at the keys too.
        run = consecutive_failures(requests, ours, at) if findings is not None else 0
        seen = Observation(at, int(np.searchsorted(ends, at)), run, is_ready=True, findings=findings)
        findings = None
        state, actions = advance(state, seen)
        if actions and isinstance(actions[0], Look):
            found = sample(requests, at, past, is_canary, is_all)
            findings = judge(found, state.plan.limits, actions[0].alpha, seed)
        elif actions:
            return state, actions, at
    return state, (), at


def rates(outcomes: Sequence[Outcome], seconds: float) -> float:
    return sum(o.phase == "aborted" and o.seconds <= seconds for o in outcomes) / len(outcomes)


def time_to_95(outcomes: Sequence[Outcome]) -> float:
    """Seconds until 95 % were aborted; infinite where that did not happen."""
    times = sorted(o.seconds if o.phase == "aborted" else math.inf for o in outcomes)
    return times[math.ceil(0.95 * len(times)) - 1]


def simulate(pool: ProcessPoolExecutor, number: int, chosen: Plan, harm: Harm, until_seconds: float) -> list[Outcome]:
    one = partial(walk, chosen=chosen, harm=harm, until_seconds=until_seconds)
    return list(pool.map(one, range(number), chunksize=25))


def detect(pool: ProcessPoolExecutor, number: int, weight: int, harm: Harm, until_seconds: float) -> list[Outcome]:
    """The first of three steps, at the weight; with it the canary's share of 80 requests/s."""
    one = partial(
        walk,
        chosen=plan([weight, 50, 100], 1e9, DETECT_DEADLINE_SECONDS),
        harm=harm,
        until_seconds=until_seconds,
        canary_requests_per_second=REQUESTS_PER_SECOND * weight / 100,
    )
    return list(pool.map(one, range(number), chunksize=25))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=2000)
    parser.add_argument("--detections", type=int, default=400)
    options = parser.parse_args()
    began = time.monotonic()
    with ProcessPoolExecutor(2) as pool:
        walks = [25, 50, 100]
        same = simulate(pool, options.rollouts, plan(walks, BAKE_SECONDS, DEADLINE_SECONDS), Harm(), DEADLINE_SECONDS)
        false_rate = rates(same, math.inf)
        limit = ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / options.rollouts)
        print(f"identical versions, {options.rollouts} rollouts: {dict(Counter(o.phase for o in same))}")
        for reason in [o.reason for o in same if o.phase == "aborted"][:5]:
            print(f"  aborted: {reason[:200]}")
        # Half the traffic's steps would never pass without tolerance, so the edge is one step that only looks.
        edge = simulate(pool, options.rollouts // 2, plan([25], 1e9, 120.0, False), Harm(), 119.0)
        print(f"no tolerance, one step of 120 s: aborted {rates(edge, math.inf):.4f} (may be {ALPHA:.2f})")
        errors = detect(pool, options.detections, 25, Harm(more_errors=0.05), 60.0)
        slower = detect(pool, options.detections, 25, Harm(slower=1.5), 60.0)
        looks = ", ".join(f"{t:.0f}" for t in look_seconds(DETECT_DEADLINE_SECONDS)[:6])
        print(f"25 %, 20 requests/s on the canary, looks at {looks} ... s; time to 95 %:")
        print(f"  +5 points of errors {time_to_95(errors):.0f} s, all times x1.5 {time_to_95(slower):.0f} s")
        few = max(options.detections // 4, 40)
        for weight, harm, name in (
            (15, Harm(more_errors=0.05), "15 %, +5 points of errors"),
            (15, Harm(slower=1.5), "15 %, all times x1.5"),
            (10, Harm(more_errors=0.05), "10 %, +5 points of errors"),
            (10, Harm(slower=1.5), "10 %, all times x1.5"),
            (25, Harm(slower_tail=5.0), "25 %, the slowest 5 % x5"),
        ):
            seconds = time_to_95(detect(pool, few, weight, harm, 480.0))
            print(f"  {name}: {f'{seconds:.0f} s' if seconds < math.inf else 'not within 480 s'}")
    print(f"{time.monotonic() - began:.0f} s for all of it, {NUM_USERS} users")
    figures = {
        "false_abort_rate": round(false_rate, 4),
        "limit": round(limit, 4),
        "errors_caught_in_30s": round(rates(errors, 30.0), 4),
        "latency_caught_in_30s": round(rates(slower, 30.0), 4),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
