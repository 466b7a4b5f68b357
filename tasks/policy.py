"""Retries, tags and names of tasks, in one place.

A derivation may be repeated any time: what was made is remembered. So trouble that passes (a server that does not
answer) is retried; what a stage or a rule says (StageFailed, BadInput, NotAllowed, Corrupt, Conflict) is not: it
would be said again. Timeouts of stages are the launcher's and the site's, not Prefect's: a worker ends with its group.
"""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE

from mansard.errors import MansardError
from mansard.serving.client import HostDown

P = ParamSpec("P")
R = TypeVar("R")

TAG = "mansard"
RETRY_DELAYS_SECONDS = [5.0, 20.0, 60.0]
"""Long enough for a server of the stack to come back after `mansard up`."""
ROLLOUT_POLL_SECONDS = 1.0
HOST_AWAY_SECONDS = 900.0
"""So long a follower waits for a host that was killed; the rollout itself waits for ever."""


def passes(error: BaseException) -> bool:
    """Whether trying again may help: only infrastructure that did not answer."""
    return type(error) in (MansardError, HostDown)


def derivation(function: Callable[P, R]) -> Task[P, R]:
    """A task that asks for derivations: safe to repeat, so retried while servers are away."""
    return task(
        tags=[TAG, "derivation"],
        retries=len(RETRY_DELAYS_SECONDS),
        retry_delay_seconds=RETRY_DELAYS_SECONDS,
        retry_condition_fn=_should_retry,
        cache_policy=NO_CACHE,  # the store remembers, by recipe
        persist_result=False,
    )(function)


def record(function: Callable[P, R]) -> Task[P, R]:
    """A task that writes a record which compare-and-swap or its own key makes safe to repeat."""
    return task(
        tags=[TAG, "record"],
        retries=len(RETRY_DELAYS_SECONDS),
        retry_delay_seconds=RETRY_DELAYS_SECONDS,
        retry_condition_fn=_should_retry,
        cache_policy=NO_CACHE,
        persist_result=False,
    )(function)


def once(function: Callable[P, R]) -> Task[P, R]:
    """A task that is never retried: it moves something, or only looks on."""
    return task(tags=[TAG, "once"], cache_policy=NO_CACHE, persist_result=False)(function)


def _should_retry(of: Any, run: Any, state: Any) -> bool:  # noqa: ANN401 - Prefect's signature
    error = state.result(raise_on_failure=False)
    return isinstance(error, BaseException) and passes(error)
