"""Derivations that people can watch: the launcher, a bar in the terminal, an artifact in Prefect, runs in MLflow."""

import contextlib
import math
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import PrefectException

from mansard.errors import MansardError
from mansard.launch import Progress, Request, derive_all, recipe_of
from mansard.records import Derivation
from mansard.site import Site
from mansard.store.locks import file_lock, file_lock_if_free
from mansard.store.store import Store
from tasks import tracking
from tasks.progress_reading import reading
from tasks.terminal import say, stage_progress

LEASE_REACH_SECONDS = 600.0
"""What an upgrade took into the store just before its work began (its suites) stays as long as the work lasts."""
ARTIFACT_SECONDS = 2.0
"""Prefect's progress artifact is updated at most this often."""
ARTIFACT_ERRORS = (httpx.HTTPError, httpx.InvalidURL, PrefectException, OSError, ValueError)
"""No server, a server that refuses, another program at its port (whose answer is no JSON: ValueError)."""


@dataclass(frozen=True, slots=True)
class Work:
    """Where one upgrade runs and is recorded; every task takes it first."""

    site: Site
    run: tracking.UpgradeRun

    @property
    def store(self) -> Store:
        return Store.of(self.site)


@contextlib.contextmanager
def recorded(site: Site, model_name: str, title: str, key: str, tags: Mapping[str, str]) -> Iterator[Work]:
    """The work of one upgrade, with its parent run in MLflow; the run ends as the block does.

    One command at a time works on what `key` names: MLflow has no compare-and-swap, so two would make two runs.
    """
    lease = Store.of(site).lease(reach_seconds=LEASE_REACH_SECONDS)
    with lease, _alone(site.run / "upgrades" / f"{key}.lock", title):
        run = tracking.open_upgrade(model_name, title, key, tags)
        try:
            yield Work(site, run)
        except BaseException as error:
            status = "FAILED" if isinstance(error, Exception) else "KILLED"
            with contextlib.suppress(MansardError):  # the first trouble is the one to tell
                tracking.close_upgrade(run, status, {"mansard_error": str(error)[:4000]})
            raise
        tracking.close_upgrade(run, "FINISHED")


@contextlib.contextmanager
def _alone(path: Path, title: str) -> Iterator[None]:
    """Hold the lock; whoever has to wait for it reads why."""
    with contextlib.ExitStack() as held:
        if not held.enter_context(file_lock_if_free(path)):
            say(f"{title}: another command works on it: waiting for its result")
            held.enter_context(file_lock(path))
        yield


@dataclass(frozen=True, slots=True)
class Asked:
    """A derivation and how people read of it. `data` names the inputs that are data sets; the others are models."""

    request: Request
    title: str
    data: frozenset[str] = field(default_factory=frozenset)

    def inputs(self) -> tracking.Inputs:
        items = self.request.inputs.items()
        return tracking.Inputs(
            models={name: s for name, s in items if name not in self.data},
            data={name: s for name, s in items if name in self.data},
        )


def recipe(site: Site, request: Request) -> str:
    return recipe_of(request, site.environment_of(request.stage).lock)


def is_remembered(work: Work, request: Request) -> bool:
    """Whether deriving it again would start no process."""
    return work.store.recall(recipe(work.site, request)) is not None


def derive_one(work: Work, asked: Asked, has_bar: bool = True) -> Derivation:
    return derive_many(work, [asked], has_bar)[0]


def derive_many(work: Work, asked: Sequence[Asked], has_bar: bool = True) -> list[Derivation]:
    """Derivations of one stage, in the order asked for. One child run each; `has_bar` is off beside another stage."""
    with contextlib.ExitStack() as stack:
        runs = [
            stack.enter_context(
                tracking.stage_run(work.run, a.request.stage, a.title, recipe(work.site, a.request))
            )
            for a in asked
        ]
        show = stack.enter_context(stage_progress(has_bar))
        reports: list[Progress] = [show, PrefectProgress(asked[0].title)]
        if len(runs) == 1:  # what a shared process tells of itself belongs to no one run
            reports.append(metrics_to(runs[0]))
        made = derive_all(work.store, work.site, [a.request for a in asked], together(reports))
        for running, derivation, one in zip(runs, made, asked, strict=True):
            tracking.finish_stage(
                running, derivation, one.title, one.inputs(), work.site.store_uri, facts=one.request.spec
            )
    return made


class PrefectProgress:
    """A progress artifact on the page of the task run that is running. Call it with what the stage tells.

    A server that does not answer, or not as expected, costs no stage its work.
    """

    def __init__(self, title: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._title = title
        self._clock = clock
        self._artifact: UUID | None = None
        self._sent_at = -math.inf

    def __call__(self, stage: str, progress: Mapping[str, Any]) -> None:
        now, at = reading(progress), self._clock()
        if at - self._sent_at < ARTIFACT_SECONDS and now.percent < 100:
            return
        self._sent_at = at
        whole = "" if now.total is None else f" of {now.total:,.0f}"
        text = f"{self._title}: {now.completed:,.0f}{whole} {now.unit}".rstrip()
        with contextlib.suppress(*ARTIFACT_ERRORS):
            if self._artifact is None:
                self._artifact = _not_a_coroutine(
                    create_progress_artifact(now.percent, key=f"mansard-{stage}", description=text)
                )
            else:
                update_progress_artifact(self._artifact, now.percent, description=text)


def metrics_to(running: tracking.StageRun) -> Progress:
    """A stage's metrics, sent to its run while it works; the step is how much is done."""

    def report(stage: str, progress: dict[str, Any]) -> None:
        now = reading(progress)
        if now.metrics:
            running.add(now.metrics, int(now.completed))

    return report


def together(reports: Sequence[Progress]) -> Progress:
    """One callback that calls each."""

    def report(stage: str, progress: dict[str, Any]) -> None:
        for each in reports:
            each(stage, progress)

    return report


def _not_a_coroutine(artifact: UUID | Coroutine[Any, Any, UUID]) -> UUID:
    """Prefect answers a coroutine only inside an event loop; tasks here are plain functions."""
    assert isinstance(artifact, UUID)
    return artifact
