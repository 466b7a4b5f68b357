"""300 sticky users with Zipf traffic and unequal latency: requests as arrays, and what router workers would tell.

Each user has a rate (Zipf, exponent 1), a speed, a length of answers and an error rate of their own,
drifts by the half minute, and belongs to a tenant; tenants have unequal numbers of users.
Times to first token and between tokens are lognormal. Seconds throughout.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mansard.release.analysis import Sample

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

NUM_USERS = 300
REQUESTS_PER_SECOND = 80.0
PAST_SECONDS = 300.0
ERROR_RATE = 0.02
"""The most that stable may fail (issue 5)."""
REFUSED_RATE = 0.01
"""An engine's own 4xx."""
DRIFT_SECONDS = 30.0
USER_SPREAD, REQUEST_SPREAD, DRIFT_SPREAD = 0.6, 0.5, 0.15
"""Of the logarithm: between users, within a user, and of a user's half minutes."""


@dataclass(frozen=True, slots=True)
class Harm:
    """What a canary does worse. `slower` multiplies all times; `slower_tail` the times of the slowest 5 %."""

    more_errors: float = 0.0
    slower: float = 1.0
    slower_tail: float = 1.0


@dataclass(frozen=True, slots=True)
class Requests:
    """One row a request, in the order of arrival; `first`, `whole` are seconds from arrival. `tenant` is per user."""

    user: Ints
    at: Floats
    failed: Bools
    refused: Bools
    first: Floats
    whole: Floats
    events: Floats
    tenant: Ints


def requests_between(rng: np.random.Generator, begin: float, end: float, people: "People") -> Requests:
    """What the users send in a span of time, as stable would answer it."""
    num_users = len(people.rates)
    user = np.repeat(np.arange(num_users), rng.poisson(people.rates * (end - begin)))
    at = rng.uniform(begin, end, len(user))
    order = np.argsort(at)
    user, at = user[order], at[order]
    period = ((at - begin) // DRIFT_SECONDS).astype(np.int64)
    drift = rng.normal(0.0, DRIFT_SPREAD, (num_users, int(period.max(initial=0)) + 1))[user, period]
    speed = np.exp(people.speed[user] + drift)
    first = 0.2 * speed * rng.lognormal(0.0, REQUEST_SPREAD, len(user))
    events = np.ceil(40 * np.exp(people.length[user]) * rng.lognormal(0.0, REQUEST_SPREAD, len(user))) + 1
    between = 0.02 * speed * rng.lognormal(0.0, 0.3, len(user))
    failed = rng.random(len(user)) < people.error_rates[user]
    refused = ~failed & (rng.random(len(user)) < REFUSED_RATE)
    return Requests(user, at, failed, refused, first, first + between * (events - 1), events, people.tenant)


@dataclass(frozen=True, slots=True)
class People:
    """The users of one rollout."""

    rates: Floats
    speed: Floats
    length: Floats
    error_rates: Floats
    bucket: Floats
    tenant: Ints

    @staticmethod
    def draw(
        rng: np.random.Generator, requests_per_second: float = REQUESTS_PER_SECOND, num_tenants: int = 1
    ) -> "People":
        zipf = 1.0 / np.arange(1, NUM_USERS + 1)
        # Gamma of shape 2: a third of the users fail half as often as all do, one in seven twice as often.
        own = rng.gamma(2.0, 1.0, NUM_USERS)
        own = np.minimum(own * ERROR_RATE * zipf.sum() / (own * zipf).sum(), 0.5)
        return People(
            rates=requests_per_second * zipf / zipf.sum(),
            speed=rng.normal(0.0, USER_SPREAD, NUM_USERS),
            length=rng.normal(0.0, USER_SPREAD, NUM_USERS),
            error_rates=own,
            bucket=rng.random(NUM_USERS) * 100,
            tenant=_tenants(rng, num_tenants),
        )


def _tenants(rng: np.random.Generator, number: int) -> Ints:
    """The largest of ten has about a quarter of the users, the smallest 2 %."""
    if number == 1:
        return np.zeros(NUM_USERS, dtype=np.int64)
    return rng.choice(number, NUM_USERS, p=rng.dirichlet(np.full(number, 2.0)))


def harmed(requests: Requests, is_canary: Bools, harm: Harm, rng: np.random.Generator) -> Requests:
    """The same requests where the canary answers those of its users."""
    ours = is_canary[requests.user]
    failed = requests.failed | (ours & (rng.random(len(ours)) < harm.more_errors))
    factor = np.where(ours, harm.slower, 1.0)
    if harm.slower_tail != 1.0 and ours.any():
        factor = np.where(ours & (requests.whole > np.quantile(requests.whole, 0.95)), harm.slower_tail, factor)
    return replace(requests, failed=failed, first=requests.first * factor, whole=requests.whole * factor)


def sums(requests: Requests, at: float) -> tuple[Floats, Floats]:
    """(sums, counts) per metric and user at the moment `at`: what the host adds up, unfinished requests by age."""
    begun = requests.at <= at
    done = begun & (requests.at + requests.whole <= at)
    started = begun & (requests.at + requests.first <= at)
    good = done & ~requests.failed & ~requests.refused
    decided = done & ~requests.refused
    age = np.where(done, requests.whole, at - requests.at)
    timed = begun & ~(done & (requests.failed | requests.refused))

    def per_user(where: Bools, values: Floats | None = None) -> Floats:
        weights = None if values is None else values[where]
        return np.bincount(requests.user[where], weights, len(requests.tenant)).astype(np.float64)

    gaps = requests.events - 1
    rows = (
        (per_user(decided, requests.failed.astype(np.float64)), per_user(decided)),
        (per_user(started, requests.first), per_user(started)),
        (per_user(good, requests.whole - requests.first), per_user(good, gaps)),
        (per_user(timed, age), per_user(timed)),
        (per_user(good, requests.events), per_user(good)),
        (per_user(done, requests.refused.astype(np.float64)), per_user(done)),
    )
    return np.array([r[0] for r in rows]), np.array([r[1] for r in rows])


def sample(requests: Requests, at: float, past: tuple[Floats, Floats], is_canary: Bools, is_all: bool) -> Sample:
    sums_MK, counts_MK = sums(requests, at)
    return Sample(None if is_all else is_canary, sums_MK, counts_MK, past[0], past[1], requests.tenant)
