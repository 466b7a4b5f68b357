"""Derivations: recipe, recall, or a worker process of its own.

`derive` computes the recipe of a stage; when the store remembers it and still holds the snapshot, that is the answer.
Otherwise a worker (mansard.worker) runs with the interpreter that the site names, in its own process group, with a log
file, a timeout and a heartbeat. The worker dies when this process does (its standard input closes). How it starts is
worker_start.py's.
"""

import contextlib
import json
import os
import re
import selectors
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mansard.digest import digest_json
from mansard.errors import BadInput, StageFailed, error_named
from mansard.records import Derivation, SnapshotId
from mansard.site import Site
from mansard.site_sections import Environment
from mansard.stages import declaration
from mansard.store.store import Store
from mansard.worker_start import WorkerProcess, WorkerRequest, start_worker, worker_variables

HEARTBEAT_SECONDS = 600.0
"""A worker that says nothing for this long is taken for hung (its own thread beats every 5 s)."""

Progress = Callable[[str, dict[str, Any]], None]
"""Called with the stage's name and a mapping: {"done", "total", "unit", "text", "metrics": {...}}. `total` is None
while nobody knows it. It must not raise: the worker is ended then."""


@dataclass(frozen=True, slots=True)
class Request:
    """One derivation asked for. `where` (endpoints, folders) reaches the stage but not the recipe."""

    stage: str
    inputs: Mapping[str, SnapshotId]
    spec: Mapping[str, Any]
    where: Mapping[str, Any] = field(default_factory=dict)


def locked_versions(lock: Path, packages: Sequence[str]) -> dict[str, str]:
    """The versions that a lock file (name==version lines) pins for `packages`."""
    try:
        text = lock.read_text()
    except OSError as error:
        raise BadInput(f"{lock}: cannot read the lock: {error.strerror}; the site's environments name it") from error
    pins = dict(re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", text, flags=re.MULTILINE))
    normal = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    missing = [p for p in packages if p not in normal]
    if missing:
        raise BadInput(f"{lock}: no version of {', '.join(missing)}, which a stage declares; add NAME==VERSION lines")
    return {p: normal[p] for p in packages}


def recipe_of(request: Request, lock: Path) -> str:
    """Digest of everything that decides what comes out; the lock says which versions run."""
    return recipe_with(request, locked_versions(lock, declaration(request.stage).packages))


def recipe_with(request: Request, versions: Mapping[str, str]) -> str:
    """The same, from the versions of the packages that the stage declares."""
    return digest_json(
        {
            "stage": request.stage,
            "code_version": declaration(request.stage).code_version,
            "packages": dict(versions),
            "inputs": dict(request.inputs),
            "spec": dict(request.spec),
        }
    )


def derive(store: Store, site: Site, request: Request, progress: Progress | None = None) -> Derivation:
    """One derivation; raises what the stage raised, or StageFailed with the log's path."""
    return derive_all(store, site, [request], progress)[0]


def derive_all(
    store: Store, site: Site, requests: Sequence[Request], progress: Progress | None = None
) -> list[Derivation]:
    """Derivations of one stage; those not yet known share one worker process. In the order asked for."""
    stages = {r.stage for r in requests}
    assert len(stages) == 1, f"one stage a call, not {stages}"
    stage = stages.pop()
    environment = site.environment_of(stage)
    recipes = [recipe_of(r, environment.lock) for r in requests]
    made: dict[str, Derivation] = {}
    missing = []
    for request, recipe in zip(requests, recipes, strict=True):
        known = store.recall(recipe)
        if known is not None:
            made[recipe] = Derivation(stage, known, recipe, reused=True, seconds=0.0, log="")
        else:
            missing.append((request, recipe))
    if missing:
        made |= _run_worker(store, site, environment, stage, missing, progress)
    return [made[r] for r in recipes]


def _run_worker(
    store: Store,
    site: Site,
    environment: Environment,
    stage: str,
    missing: list[tuple[Request, str]],
    progress: Progress | None,
) -> dict[str, Derivation]:
    first = missing[0][1]
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    log = site.logs / "stages" / f"{stamp}-{stage}-{first[:12]}-{os.getpid()}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    packages = declaration(stage).packages
    message = {
        "format": 1,
        "store": str(store.root),
        "store_url": store.url,
        "stage": stage,
        "packages": locked_versions(environment.lock, packages),
        "requests": [
            {"recipe": c, "inputs": dict(r.inputs), "spec": dict(r.spec), "where": dict(r.where)} for r, c in missing
        ],
        "log": str(log),
    }
    request_file = log.with_suffix(".request.json")
    request_file.write_text(json.dumps(message, indent=1))
    worker = WorkerRequest(stage, request_file, site.home, worker_variables(environment))
    with log.open("ab") as log_file:
        process = start_worker(environment, worker, log_file)
    try:
        if progress is not None:  # its imports take long enough for a person to wonder
            progress(stage, {"done": 0, "total": None, "unit": "", "text": "starting"})
        results = _follow(process, stage, log, site.stage_timeout_seconds, progress)
    finally:
        _end(process)
    return {
        r["recipe"]: Derivation(stage, r["snapshot"], r["recipe"], bool(r["reused"]), float(r["seconds"]), str(log))
        for r in results
    }


def _follow(
    process: WorkerProcess, stage: str, log: Path, timeout_seconds: float, progress: Progress | None
) -> list[dict[str, Any]]:
    """Read the worker's messages (JSON lines) until it ends; return its results."""
    assert process.stdout is not None
    deadline = time.monotonic() + timeout_seconds
    results: list[dict[str, Any]] = []
    buffer = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(min(HEARTBEAT_SECONDS, max(deadline - time.monotonic(), 0.0))):
                late = time.monotonic() >= deadline
                what = f"ran over {timeout_seconds:.0f} s" if late else f"said nothing for {HEARTBEAT_SECONDS:.0f} s"
                raise StageFailed(f"stage {stage} {what} and was ended; its log: {log}")
            chunk = os.read(process.stdout.fileno(), 1 << 16)
            if not chunk:
                break
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                _take(json.loads(line), stage, results, progress)
    code = process.wait()
    if code != 0:
        raise StageFailed(f"stage {stage} ended with exit status {code}: {_last_line(log)}; its log: {log}")
    return results


def _take(message: dict[str, Any], stage: str, results: list[dict[str, Any]], progress: Progress | None) -> None:
    if "result" in message:
        results.append(message["result"])
    elif "error" in message:
        raise error_named(message["error"]["kind"], message["error"]["message"], StageFailed)
    elif "progress" in message and progress is not None:
        progress(stage, message["progress"])


def _end(process: WorkerProcess) -> None:
    """Leave no process of the group behind."""
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the whole group has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


def this_interpreter(root: Path) -> Environment:
    """The environment of the running process, for tests and tools without a site."""
    return Environment(python=Path(sys.executable), lock=root / "infra/constraints/main.txt")
