"""When a rollout's analysis may fail the canary, and how much of its error rate each look spends. Pure.

Why spending and not a confidence sequence: at every look the same sticky keys come back with a little more of each, so
looks are strongly dependent and their increments are not new given the past. Spending alpha over looks fixed in time
(Lan & DeMets 1983) by the union bound holds whatever that dependence is. Looks are at 14.5 s, twice that, and so on: an
hour costs ten of them, not thousands. Most is spent on the first step's second look, because what is bad from the start
should reach few people for half a minute, and that is what it takes to see (tests/benchmarks/bench_rollout.py).

All metrics of all steps of one rollout together abort an identical version with probability ALPHA at most.
"""

ALPHA = 0.05
FIRST_SECONDS = 14.5
GROWTH = 2.0
FIRST_STEP_SHARE = 0.6
FIRST_LOOKS_SHARES = (0.25, 0.4)
"""The rest is for the other steps, or looks, evenly."""
FIRST_ATTEMPT_SHARE = 0.9
"""Of a step's alpha. A step that a restarted host walks again has half of what is left, so that restarts add none."""


def look_seconds(deadline_seconds: float) -> tuple[float, ...]:
    """Seconds in a step at which to look, the deadline last."""
    times, at = [], FIRST_SECONDS
    while at < deadline_seconds:
        times.append(at)
        at *= GROWTH
    return (*times, deadline_seconds)


def alpha_of_look(step: int, num_steps: int, look: int, deadline_seconds: float, attempt: int) -> float:
    """What a look spends. `step`, `look` and `attempt` (how often the step was begun before) count from 0."""
    of_attempt = FIRST_ATTEMPT_SHARE if attempt == 0 else (1 - FIRST_ATTEMPT_SHARE) * 0.5**attempt
    num_looks = len(look_seconds(deadline_seconds))
    return (
        ALPHA * _share(step, num_steps, (FIRST_STEP_SHARE,)) * of_attempt * _share(look, num_looks, FIRST_LOOKS_SHARES)
    )


def _share(place: int, number: int, first: tuple[float, ...]) -> float:
    """The share of one of `number` places: `first` for the first ones, what is left evenly; all where none is left."""
    if number <= len(first):
        return first[place] / sum(first[:number])
    return first[place] if place < len(first) else (1 - sum(first)) / (number - len(first))
