"""One hostile tenant of ten: how many decisions of a rollout it changes, simulated.

It knows which of its invented users are the canary's (as if the split's secret were out), invents any number of them
and chooses what each does: reads many or few tokens, sends what takes long, fails or is refused, was otherwise before.
`down`: versions are alike, and it wants an abort. `up`: the canary fails 5 % more or is 1.5 times as slow, and it wants
a promotion. A decision is changed where the rollout of the same nine honest tenants, with the same requests, ends
another way. `make bench NAME=forged`; five minutes on two cores. The last line is JSON: forged_decisions_fraction, and
beside it forged_without_bound_fraction (all users are one tenant's, as before tenants counted); and how many harmful
canaries of ten honest tenants are stopped in 30 s, beside the same users as one tenant's.
"""

import argparse
import json
import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from sys import path as import_path

import numpy as np

import_path.insert(0, str(Path(__file__).parent))
from bench_rollout import DETECT_DEADLINE_SECONDS, Outcome, bake, plan, walk
from rollout_population import PAST_SECONDS, Harm, People, Requests, harmed, requests_between, sums

from mansard.release.rollout import Observation, SetWeight, State, advance

NUM_TENANTS = 10
STEPS = (25, 50, 100)
BAKE_SECONDS, DEADLINE_SECONDS = 30.0, 240.0
HARMS = (Harm(more_errors=0.05), Harm(slower=1.5))
KINDS = ("tokens", "slow", "errors", "refused", "all", "past")
CROWDS = (10, 40, 200, 600)


def forged_decisions(seed: int, worlds: int) -> float:
    """The share of decisions that the hostile tenant changes; half of the worlds are `down`, half `up`."""
    return sum(is_changed(seed + number) for number in range(worlds)) / worlds


def is_changed(seed: int, is_bounded: bool = True) -> bool:
    harm = Harm() if seed % 2 == 0 else HARMS[seed // 2 % 2]
    ends = {decision(seed, harm, is_attacked, is_bounded).phase for is_attacked in (False, True)}
    return len(ends) == 2


def decision(seed: int, harm: Harm, is_attacked: bool, is_bounded: bool = True) -> Outcome:
    """One whole rollout of honest tenants' users, and of a crowd where it is attacked."""
    rng, hostile_rng = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    honest = People.draw(rng, num_tenants=NUM_TENANTS - 1)
    kind, is_wanted_bad = str(hostile_rng.choice(KINDS)), harm == Harm()
    crowd = draw_crowd(honest, hostile_rng, int(hostile_rng.choice(CROWDS)))
    if not is_bounded:
        honest, crowd = (replace(each, tenant=np.zeros_like(each.tenant)) for each in (honest, crowd))
    people = together(honest, crowd) if is_attacked else honest
    chosen = plan(STEPS, BAKE_SECONDS, DEADLINE_SECONDS)

    def requests(begin: float, end: float, weight: int) -> Requests:
        now = harm if weight else Harm()
        sent = harmed(requests_between(rng, begin, end, honest), honest.bucket < weight, now, rng)
        if not is_attacked:
            return sent
        is_canary = crowd.bucket < weight
        invented = harmed(requests_between(hostile_rng, begin, end, crowd), is_canary, now, hostile_rng)
        is_bad = is_canary if is_wanted_bad else ~is_canary
        if weight in (0, 100):  # what is compared with its own past
            is_bad = np.full(len(is_canary), is_wanted_bad == (weight == 100))
        return mixed(sent, forged(invented, is_bad, kind) if weight or kind == "past" else invented)

    history = requests(-PAST_SECONDS, 0.0, 0)
    past = on_stable = sums(history, 0.0)
    state, actions = advance(State(chosen), Observation(is_ready=True))
    while not state.is_over:
        assert isinstance(actions[0], SetWeight)
        weight = actions[0].weight_percent
        is_canary = people.bucket < weight
        new = requests(0.0, DEADLINE_SECONDS, weight)
        before = on_stable if weight == 100 else past
        state, actions, at = bake(state, new, before, is_canary, math.inf, seed)
        stayed = sums(new, at)
        on_stable = tuple(old + np.where(is_canary, 0.0, more) for old, more in zip(on_stable, stayed, strict=True))
    return Outcome(state.phase, at, state.reason)


def draw_crowd(honest: People, rng: np.random.Generator, number: int) -> People:
    """A tenant's invented users, half as busy together as all others; half of the time all on the canary's side."""
    rate = np.full(number, honest.rates.sum() / 2 / number)
    bucket = rng.random(number) * (100 if rng.random() < 0.5 else STEPS[0])
    return People(
        rates=rate,
        speed=rng.normal(0.0, 0.3, number),
        length=np.zeros(number),
        error_rates=np.full(number, 0.01),
        bucket=bucket,
        tenant=np.full(number, NUM_TENANTS),
    )


def together(one: People, other: People) -> People:
    return People(**{f.name: np.append(getattr(one, f.name), getattr(other, f.name)) for f in fields(People)})


def mixed(one: Requests, other: Requests) -> Requests:
    """In the order of arrival; the other's users come after the one's."""
    order = np.argsort(np.append(one.at, other.at), kind="stable")
    other = replace(other, user=other.user + len(one.tenant))
    both = {f.name: np.append(getattr(one, f.name), getattr(other, f.name)) for f in fields(Requests)}
    return Requests(**{name: values if name == "tenant" else values[order] for name, values in both.items()})


def forged(requests: Requests, is_bad: np.ndarray, kind: str) -> Requests:
    """What the invented users make of their requests: as bad as can be, or as good."""
    bad = is_bad[requests.user]
    good = ~bad
    events, first, whole = requests.events.copy(), requests.first.copy(), requests.whole.copy()
    failed, refused = requests.failed & ~good, requests.refused & ~good
    if kind in ("tokens", "all", "past"):
        events[bad], events[good] = 60.0, 4.0
    if kind in ("slow", "all", "past"):
        for seconds in (first, whole):
            seconds[bad] *= 6.0
            seconds[good] *= 0.2
    if kind in ("errors", "all", "past"):
        failed = failed | bad
    if kind == "refused":
        refused = refused | bad
    return replace(requests, events=events, first=first, whole=whole, failed=failed, refused=refused & ~failed)


def is_stopped(seed: int, harm: Harm, num_tenants: int) -> bool:
    """Within 31 s of the first step, 20 requests a second reaching the canary."""
    first = plan(STEPS, 1e9, DETECT_DEADLINE_SECONDS)
    return walk(seed, first, harm, 31.0, 20.0, num_tenants).phase == "aborted"


def share(answers: Sequence[bool]) -> float:
    return round(sum(answers) / len(answers), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1000)
    options = parser.parse_args()
    seeds = range(options.seed, options.seed + options.worlds)
    figures: dict[str, float] = {}
    with ProcessPoolExecutor(2) as pool:
        for name, is_bounded in (("forged_without_bound", False), ("forged_decisions", True)):
            changed = list(pool.map(partial(is_changed, is_bounded=is_bounded), seeds, chunksize=5))
            by_way = {way: [c for s, c in zip(seeds, changed, strict=True) if s % 2 == way] for way in (0, 1)}
            print(f"{name}: down {share(by_way[0])}, up {share(by_way[1])} of {len(changed)} worlds", flush=True)
            figures[f"{name}_fraction"] = share(changed)
        for harm, name in zip(HARMS, ("errors", "latency"), strict=True):
            for number in (1, NUM_TENANTS):
                one = partial(is_stopped, harm=harm, num_tenants=number)
                figures[f"{name}_caught_of_{number}_tenants"] = share(list(pool.map(one, range(100), chunksize=5)))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
