"""How much one tenant may say in a canary's analysis. Its users may be invented; its observations may be chosen.

A tenant is an API key's holder; where nobody needs a key, an address. A statistic is a sum of tenants' parts. Each
part is clipped, so that no tenant moves the sum by more than WIDTH standard deviations of SHARE of its variance,
however many users it invents and whatever they read (a bounded-influence estimate: Huber 1964). Bounds depend on users'
values and tenants alone, never on sides, so a permutation test of the clipped sum keeps its exact level. Guarantees: of
ten or more tenants alike, a hostile one moves a location by at most 0.6 of its standard errors. With four or fewer,
bounds are wider, so that those who all agree can still prove something; then one of them weighs more.

Where one tenant has the users (the others fewer than MIN_OTHERS and a fifth), there is nobody else: it counts in full.
Does not cover: several keys of one person; harm to one tenant alone, which looks like a hostile one.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

SHARE = 0.15
WIDTH = 1.5
"""Wider takes less power from honest tenants and gives a hostile one more (tests/benchmarks/bench_forged.py)."""
REACH = 3e-7
"""Tenants who all agree must be able to be so unlikely: below what any look spends on any metric."""
OWN_GROUP = 20
"""Users of a tenant from which sides are exchanged within it alone."""
MIN_OTHERS = 30
OTHERS_SHARE = 0.2

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Tenants:
    """Each user's tenant, counted from 0. `sole` is the one that counts in full because there is nobody else."""

    of_user_K: Ints
    number: int
    sole: int | None

    def sums(self, values_K: Floats) -> Floats:
        """Per tenant."""
        return np.bincount(self.of_user_K, values_K, self.number).astype(np.float64)

    def of(self, users_K: npt.NDArray[np.bool_]) -> "Tenants":
        """The same for some of the users; who is the sole one stays."""
        return Tenants(self.of_user_K[users_K], self.number, self.sole)


def tenants_of(tenant_K: Ints | None, num_users: int) -> Tenants:
    """From any numbers for tenants. None: all users are one tenant's."""
    if tenant_K is None or not num_users:
        return Tenants(np.zeros(num_users, dtype=np.int64), 1, 0)
    names, places = np.unique(tenant_K, return_inverse=True)
    sizes = np.bincount(places)
    others = num_users - int(sizes.max())
    is_alone = others < MIN_OTHERS and others < OTHERS_SHARE * num_users
    return Tenants(places.astype(np.int64), len(names), int(sizes.argmax()) if is_alone else None)


def exchangeable(tenants: Tenants) -> list[Ints]:
    """Users whose sides may be exchanged: within each tenant, so that one whose users are all on one side shifts
    nothing; tenants of few users among themselves."""
    sizes = np.bincount(tenants.of_user_K, minlength=tenants.number)
    is_large = sizes >= OWN_GROUP
    groups = [np.flatnonzero(tenants.of_user_K == tenant) for tenant in np.flatnonzero(is_large)]
    few = np.flatnonzero(~is_large[tenants.of_user_K])
    return [*groups, few] if len(few) else groups


def counted(sizes: npt.ArrayLike, sole: bool) -> int:
    """How many users count as such: of a tenant as many as of all others together, unless there is nobody else."""
    numbers = np.asarray(sizes, dtype=np.int64)
    total, largest = int(numbers.sum()), int(numbers.max(initial=0))
    return total if sole else min(total, 2 * (total - largest))


def bounds(variances_T: Floats, sole: int | None, as_second: bool = False) -> Floats:
    """What each tenant's part of a sum may be at most, up or down; `variances_T` are those of the parts. `as_second`:
    as much as the second largest, too, which gives a test more power where tenants are unequal.
    """
    ordered = np.sort(variances_T)[::-1]
    if len(ordered) < 2 or not ordered[0] > 0:
        return np.full(len(ordered), math.inf)
    limit, second = _level(ordered), float(ordered[1])
    limit = max(limit, second) if as_second else limit or second
    if sole is not None:
        limit = SHARE * float(variances_T[sole])
    if limit <= 0:
        return np.full(len(ordered), math.inf)
    num_present = int(np.count_nonzero(variances_T))
    width = WIDTH if sole is not None else max(WIDTH, NormalDist().inv_cdf(1 - REACH ** (1 / num_present)))
    most = np.full(len(ordered), width * math.sqrt(limit))
    if sole is not None:
        most[sole] = math.inf
    return most


def location(values_K: Floats, weights_K: Floats, tenants: Tenants) -> tuple[float, float]:
    """The weighted mean in which no tenant's part exceeds its bound, and its standard error over users."""
    weights_T = tenants.sums(weights_K)
    present_T = weights_T > 0
    means_T = np.divide(tenants.sums(weights_K * values_K), weights_T, out=np.zeros(tenants.number), where=present_T)
    sole = tenants.sole
    start = means_T[sole] if sole is not None and present_T[sole] else _median(means_T[present_T], weights_T[present_T])
    most_T = bounds(tenants.sums((weights_K * (values_K - start)) ** 2), sole)
    mean = _balance(means_T[present_T], weights_T[present_T], most_T[present_T])
    spread = np.minimum(tenants.sums((weights_K * (values_K - mean)) ** 2), most_T**2)
    return mean, math.sqrt(float(spread.sum())) / float(weights_T.sum())


def _level(ordered: Floats) -> float:
    """The level above which each is cut off, so that none is more than SHARE of what remains; 0 where that is none."""
    total, level = float(ordered.sum()), 0.0
    for num_cut in range(min(len(ordered), math.ceil(1 / SHARE))):
        level = SHARE * total / (1 - SHARE * num_cut)
        if ordered[num_cut] <= level:
            return level
        total -= float(ordered[num_cut])
    return 0.0


def _median(means_T: Floats, weights_T: Floats) -> float:
    """The weighted median, where no tenant weighs more than the second largest."""
    weights = np.minimum(weights_T, np.sort(weights_T)[-2]) if len(weights_T) > 1 else weights_T
    order = np.argsort(means_T)
    above = np.cumsum(weights[order]) >= weights.sum() / 2
    return float(means_T[order][np.argmax(above)])


def _balance(means_T: Floats, weights_T: Floats, most_T: Floats) -> float:
    """Where the clipped parts sum to zero. Plain arithmetic where none is clipped."""
    plain = float(np.average(means_T, weights=weights_T))
    if (np.abs(weights_T * (means_T - plain)) <= most_T).all():
        return plain
    low, high = float(means_T.min()), float(means_T.max())
    for _ in range(60):
        middle = (low + high) / 2
        if np.clip(weights_T * (means_T - middle), -most_T, most_T).sum() > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
