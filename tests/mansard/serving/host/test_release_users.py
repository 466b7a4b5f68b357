"""Who asked lately, and whom each step of a release would find."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mansard.errors import Conflict
from mansard.release.analysis import MIN_KEYS
from mansard.release.rollout import Step
from mansard.serving.host.release_users import users_of
from mansard.serving.host.sticky_keys import is_canary_user, user_named
from mansard.serving.split import key_digest

SALT = "5" * 32


def keys(number: int) -> set[str]:
    return {named(str(name)) for name in range(number)}


def named(name: str, tenant: int = 1) -> str:
    return user_named(f"{key_digest('demo', name):016x}", f"{tenant:016x}")


def steps(*weights: int) -> list[Step]:
    return [Step(weight, 1.0, 1, 300.0) for weight in weights]


@given(st.integers(0, 400), st.integers(1, 100))
def test_sides_are_those_of_the_router_and_too_few_on_either_are_refused(number: int, weight: int) -> None:
    there = keys(number)
    users = users_of(there, steps(weight), SALT)
    canary = sum(is_canary_user(key, weight, SALT) for key in there)
    assert users.as_json()["steps"] == [{"weight_percent": weight, "canary": canary, "stable": number - canary}]
    if canary >= MIN_KEYS and (weight == 100 or number - canary >= MIN_KEYS):
        users.check("demo", 2)
    else:
        with pytest.raises(Conflict, match=f"{number} users asked lately"):
            users.check("demo", 2)


def test_the_first_step_that_finds_too_few_is_named_with_what_it_needs() -> None:
    with pytest.raises(Conflict, match=r"step 1 of 3 \(5 %\).*about 600 users") as caught:
        users_of(keys(200), steps(5, 50, 100), SALT).check("demo", 2)
    assert "\n" not in str(caught.value)
    with pytest.raises(Conflict, match=r"step 2 of 2 \(95 %\).*about 600 users"):
        users_of(keys(200), steps(50, 95), SALT).check("demo", 2)
    with pytest.raises(Conflict, match=r"step 1 of 1 \(100 %\).*would see them all.*about 30 users"):
        users_of(keys(29), steps(100), SALT).check("demo", 2)
    with pytest.raises(Conflict, match="a router worker did not answer, and 0 users"):
        users_of(set(), steps(50), SALT, is_heard=False).check("demo", 2)


def test_a_first_version_needs_nobody() -> None:
    users_of(set(), [], SALT).check("demo", 1)


def test_the_demos_users_are_enough_for_the_demos_steps() -> None:
    from flows.demo_traffic import USERS

    there = {named(f"/x-user-id/user-{number}") for number in range(USERS)}
    users_of(there, steps(25, 50, 100), SALT).check("demo", 2)
    counts = [step["canary"] for step in users_of(there, steps(25, 50, 100), SALT).as_json()["steps"]]
    assert all(one <= other for one, other in itertools.pairwise(counts))


def test_an_invented_crowd_is_no_more_than_everybody_else() -> None:
    honest = {named(f"user-{number}", tenant=number % 9 + 1) for number in range(40)}
    crowd = {named(f"invented-{number}", tenant=100) for number in range(5000)}
    users = users_of(honest | crowd, steps(25, 50), SALT)
    assert (users.seen, users.named) == (80, 5040)
    with pytest.raises(Conflict, match=r"80 users asked lately [(]of 5040 names, most of them one tenant's"):
        users.check("demo", 2)


def test_a_tenant_beside_whom_there_is_nobody_else_counts_in_full() -> None:
    users = users_of(keys(300) | {named("monitoring", tenant=2)}, steps(25, 50), SALT)
    assert users.seen == 301
    users.check("demo", 2)
