"""Engines and rollouts, asked of the host."""

import contextlib
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mansard.errors import BadInput, MansardError
from mansard.records import SnapshotId
from mansard.serving.client import HostClient
from mansard.site import Site
from mansard.specs.whole import Serve
from tasks import policy
from tasks.terminal import say

NEWS_SECONDS = 15.0
"""How often a person hears of an engine that is starting."""


@dataclass(frozen=True, slots=True)
class RunningEngine:
    """Where an artifact answers. Endpoints are of this moment: they never enter a recipe."""

    endpoint: str
    served_name: str
    pid: int


def engine_release(site: Site) -> dict[str, str]:
    """The engine's locked version: another vLLM may answer otherwise, so it belongs to the recipe of every answer."""
    lock = site.environments[site.engine.environment].lock
    found = re.search(r"^(vllm(?:-cpu)?)==(\S+)", lock.read_text(), flags=re.MULTILINE)
    if found is None:
        raise BadInput(f"{lock}: no version of vllm; environment {site.engine.environment!r} runs the engines")
    return {found[1]: found[2]}


def ensure_engine(site: Site, model_name: str, artifact: SnapshotId, serve: Serve) -> RunningEngine:
    """The artifact's engine, started if need be: a minute or two on a CPU. MansardError with vLLM's last lines."""
    body = {"model": model_name, "artifact": artifact, "serve": serve.model_dump(mode="json"), "wait": True}
    # The host has its own deadline for a start; ours only bounds a host that hangs.
    timeout_seconds = 2.0 * site.engine.start_timeout_seconds
    client = HostClient(site.host_socket)
    answer = _call_with_news(
        f"engine of {artifact[:12]}", lambda: client.call("POST", "/engines", body, timeout_seconds)
    )
    return RunningEngine(answer["endpoint"], answer["served_name"], int(answer["pid"]))


def prepare_engine(site: Site, architecture: str) -> None:
    """Tell the host that an engine will be asked for soon. Only time is lost where it does not hear it."""
    with contextlib.suppress(MansardError):
        HostClient(site.host_socket).call("POST", "/engines/prepare", {"architecture": architecture})


def release_users(site: Site, model_name: str, version: int) -> dict[str, Any]:
    """How many users asked lately, and how many each step would find: nothing has started yet."""
    path = f"/rollouts/{model_name}/users/{version}"
    answer = HostClient(site.host_socket).call("GET", path, timeout_seconds=120.0)
    return {name: answer[name] for name in ("seen", "needed_on_each_side", "steps")}


def users_text(users: dict[str, Any]) -> str:
    """One line for a person."""
    if not users["steps"]:
        return f"users: {users['seen']} asked lately; nothing is stable yet, so there is nobody to compare with"
    steps = ", ".join(f"{step['canary']} at {step['weight_percent']} %" for step in users["steps"])
    needed = users["needed_on_each_side"]
    return f"users: {users['seen']} asked lately; the canary would see {steps}; {needed} on each side are needed"


@policy.once
def begin_rollout(site: Site, model_name: str, version: int, who: str, why: str) -> None:
    """NotAllowed without an approval; Conflict when the baseline moved or a rollout runs."""
    HostClient(site.host_socket).call(
        "POST", "/rollouts", {"model": model_name, "version": version, "who": who, "why": why}, timeout_seconds=120.0
    )


def rollout_state(site: Site, model_name: str) -> dict[str, Any]:
    """What the host says of the model's running or last rollout."""
    return HostClient(site.host_socket).call("GET", f"/rollouts/{model_name}", timeout_seconds=60.0)


@policy.once
def roll_back(site: Site, model_name: str, asked: dict[str, Any]) -> dict[str, Any]:
    """The host's rollback; it may start an engine first."""
    timeout_seconds = 2.0 * site.engine.start_timeout_seconds
    return HostClient(site.host_socket).call("POST", "/rollback", {"model": model_name, **asked}, timeout_seconds)


def _call_with_news(what: str, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The answer of `call`; one that takes long says so from time to time."""
    begun = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(call)
        while True:
            try:
                found = answer.result(timeout=NEWS_SECONDS)
            except TimeoutError:
                if answer.done():  # the call's own, not ours
                    raise
                say(f"{what}: starting, {time.monotonic() - begun:.0f} s (a minute or two on a CPU)")
                continue
            if time.monotonic() - begun >= NEWS_SECONDS:
                say(f"{what}: answers after {time.monotonic() - begun:.0f} s")
            return found
