"""The local stack: Prefect, MLflow, the host, the router, the mirror and the deployments server.

`up` starts what is not running and waits until all of it answers; `down` ends it in reverse order. Both hold one lock,
so that two callers never make two stacks. Imports neither prefect nor mlflow: they run in processes of their own.
Not covered: engines (the host owns them) and other machines.
"""

import contextlib
import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from subprocess import run
from typing import Any

from flows import stack_process
from flows.stack_process import Program
from mansard.canonical import sha256_json
from mansard.errors import BadInput, MansardError
from mansard.page_password import (
    USER,
    create_password,
    fingerprint,
    login_text,
    password_file,
    read_password,
)
from mansard.private_files import close_home
from mansard.serving.client import HostClient
from mansard.site import Site
from tasks.standard_streams import say as say_line

LOOPBACK = "127.0.0.1"
FRESH_SECONDS = 60.0
"""The mirror and the deployments server write a sign of life at least this often."""

LOGGED_IN = ("prefect", "mlflow", "mirror", "deployments")
"""Programs that ask for the pages' password, or log in with it."""

Say = Callable[[str], None]


def up(site: Site, say: Say | None = None) -> dict[str, str]:
    """Start what is not running, wait until all of it answers, return the URLs. Safe to repeat and to race.

    Raises BadInput when a port is taken by somebody else or the site's engines do not fit its card, MansardError when a
    program does not come up.
    """
    from mansard.serving.engine.card_memory import check_card  # `status` loads this module, and needs none of it

    check_card(site)
    tell = say or say_line
    with _stack_lock(site, tell):
        if site.authentication == "none":
            tell(login_text(site))
        elif create_password(site):
            tell(f"authentication: made a password for Prefect and MLflow ({password_file(site)})")
        for line in close_home(site):  # after the password: one that others could read is refused, not closed
            tell(line)
        waves = tuple(tuple(_with_login(site, p) for p in wave) for wave in _programs(site))
        _stop_outdated(waves, tell)
        missing = [p for wave in waves for p in wave if stack_process.running_pid(p) is None]
        for program in missing:
            _make_way(site, program)
        if any(p.name == "mlflow" for p in missing):
            _migrate_mlflow(site, tell)
        for wave in waves:
            _start_wave(site, [p for p in wave if p in missing], wave, tell)
    return urls(site)


def _with_login(site: Site, program: Program) -> Program:
    """The program as it starts: with the password, where it needs one. `down` works without it."""
    if program.name not in LOGGED_IN:
        return program
    variables = {**program.variables, **client_login(site)}
    return replace(program, variables=variables, login_fingerprint=fingerprint(site))


def _stop_outdated(waves: tuple[tuple[Program, ...], ...], tell: Say) -> None:
    """End what runs with other schedules or with another password of the pages than the site has now."""
    for program in [p for wave in reversed(waves) for p in wave]:
        if stack_process.has_other_login(program):
            tell(f"{program.name}: the password of the pages changed")
            stack_process.stop(program)
        elif program.name == "deployments" and stack_process.is_outdated(program):
            tell("deployments: the site's schedules changed")
            stack_process.stop(program)


def down(site: Site, say: Say | None = None) -> None:
    """End the stack in reverse order and wait until each program is gone, engines of a dead host included."""
    from mansard.serving.process import send, with_output_below  # asyncio: too slow for `status`, which loads this

    tell = say or say_line
    with _stack_lock(site, tell):
        for wave in reversed(_programs(site)):
            for program in reversed(wave):
                if stack_process.stop(program):
                    tell(f"{program.name}: stopped")
        for engine in with_output_below(site.logs / "engines"):
            send(engine, signal.SIGKILL)
            tell(f"engine process {engine.pid}: left by a host that was killed; ended")


def status_of_processes(site: Site) -> list[dict[str, Any]]:
    """One record a program: name, state (running, starting, stopped), pid, url, log. Starts nothing."""
    records = []
    for program in [p for wave in _programs(site) for p in wave]:
        pid = stack_process.running_pid(program)
        state = "stopped" if pid is None else "running" if program.answers() else "starting"
        records.append(
            {"name": program.name, "state": state, "pid": pid, "url": program.url, "log": str(program.log)}
        )
    return records


def is_up(site: Site) -> bool:
    """Whether every program runs and answers."""
    return all(record["state"] == "running" for record in status_of_processes(site))


def urls(site: Site) -> dict[str, str]:
    """What a person opens: the two UIs and the model API."""
    return {
        "prefect": f"http://{LOOPBACK}:{site.ports.prefect}",
        "mlflow": f"http://{LOOPBACK}:{site.ports.mlflow}",
        "router": f"http://{LOOPBACK}:{site.ports.router}/v1",
    }


def client_variables(site: Site) -> dict[str, str]:
    """The environment in which prefect and mlflow find this site's servers, and tell nobody else about it."""
    hosts = [h for h in os.environ.get("NO_PROXY", os.environ.get("no_proxy", "")).split(",") if h]
    direct = ",".join(dict.fromkeys([*hosts, LOOPBACK, "localhost"]))
    return {
        "PREFECT_API_URL": f"http://{LOOPBACK}:{site.ports.prefect}/api",
        "PREFECT_HOME": str(site.home / "prefect"),
        "PREFECT_PROFILES_PATH": str(site.home / "prefect" / "profiles.toml"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "MLFLOW_TRACKING_URI": f"http://{LOOPBACK}:{site.ports.mlflow}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # standard output is the command's own, often JSON
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # 14 s; its default of 7 is minutes of silence when it is down
        "NO_PROXY": direct,
        "no_proxy": direct,
    }


def client_login(site: Site) -> dict[str, str]:
    """The environment in which prefect and mlflow log in to this site's servers; empty without authentication."""
    password = read_password(site)
    if password is None:
        return {}
    return {
        "PREFECT_API_AUTH_STRING": f"{USER}:{password}",
        "MLFLOW_TRACKING_USERNAME": USER,
        "MLFLOW_TRACKING_PASSWORD": password,
    }


def use_servers(site: Site) -> None:
    """Set them in this process. Call it before prefect or mlflow is imported: both read them once.

    Prefect's own log then goes to its page only: a person at a terminal sees our progress, and one line of an error.
    """
    os.environ.update({**client_variables(site), **client_login(site)})
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")


def _programs(site: Site) -> tuple[tuple[Program, ...], ...]:
    """In the order of starting: each wave needs the ones before it."""
    servers = (_prefect(site), _mlflow(site), _host(site), _router(site))
    return servers, (_mirror(site), _deployments(site))


def _prefect(site: Site) -> Program:
    port = site.ports.prefect
    return _program(
        site,
        "prefect",
        ("-m", "flows.entrance", "prefect", "--site", str(site.path)),
        lambda: stack_process.http_answers(port, "/api/health"),
        variables={"PREFECT_LOGGING_TO_API_ENABLED": "false"},
        port=port,
        port_key="ports.prefect",
        url=urls(site)["prefect"],
    )


def _mlflow(site: Site) -> Program:
    port = site.ports.mlflow
    return _program(
        site,
        "mlflow",
        ("-m", "flows.entrance", "mlflow", "--site", str(site.path)),
        lambda: stack_process.http_answers(port, "/health"),
        # Its job runner would be a second program beside it; nothing here hands it jobs.
        variables={"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        port=port,
        port_key="ports.mlflow",
        url=urls(site)["mlflow"],
    )


def _host(site: Site) -> Program:
    return _program(
        site,
        "host",
        ("-m", "mansard.serving.host.host", "--site", str(site.path)),
        lambda: _socket_answers(site.host_socket, "/status"),
        stop_seconds=120.0,  # it ends its engines, and they their running requests
    )


def _router(site: Site) -> Program:
    is_own = site.router.plane == "workers"
    module, workers = ("router.supervisor", site.router.workers) if is_own else ("haproxy.driver", 1)
    return _program(
        site,
        "router",
        ("-m", f"mansard.serving.{module}", "--site", str(site.path)),
        lambda: all(_socket_answers(site.run / f"router-{index}.sock", "/observations") for index in range(workers)),
        port=site.ports.router,
        port_key="ports.router",
        url=urls(site)["router"],
        stop_seconds=60.0,
    )


def _mirror(site: Site) -> Program:
    return _program(
        site,
        "mirror",
        ("-m", "tasks.mirror", "--site", str(site.path)),
        lambda: _is_fresh(site.run / "mirror.json"),
    )


def _deployments(site: Site) -> Program:
    """Its command names the schedules' digest, so that `up` sees when they changed."""
    schedules = sha256_json([[s.name, str(s.spec), s.cron, s.author] for s in site.schedules])[:12]
    return _program(
        site,
        "deployments",
        ("-m", "flows.serve", "--site", str(site.path), "--schedules", schedules),
        lambda: _is_fresh(site.run / "deployments.json"),
        stop_seconds=60.0,  # it ends the flow runs that it started
    )


def _program(
    site: Site, name: str, arguments: tuple[str, ...], answers: Callable[[], bool], **more: Any  # noqa: ANN401 - fields
) -> Program:
    variables = {**client_variables(site), "PYTHONUNBUFFERED": "1", **more.pop("variables", {})}
    return Program(
        name=name,
        command=(sys.executable, *arguments),
        variables=variables,
        pid_file=site.run / f"{name}.pid",
        log=site.logs / f"{name}.log",
        answers=answers,
        **more,
    )


def _make_way(site: Site, program: Program) -> None:
    """End what a killed leader left behind, and wait for its port. Raises BadInput when somebody else has the port."""
    stack_process.end_leftovers(program)
    if program.port is not None and not stack_process.wait_for_port(program.port):
        raise BadInput(
            f"{site.path}: {program.port_key}: port {program.port} is taken by another program; "
            "end that one or name a free port"
        )


def _start_wave(site: Site, missing: list[Program], wave: tuple[Program, ...], tell: Say) -> None:
    begun = time.monotonic()

    def start(program: Program) -> None:
        tell(f"{program.name}: starting")
        (site.run / f"{program.name}.json").unlink(missing_ok=True)  # an old sign of life
        stack_process.start(program, site.home)

    def follow(program: Program) -> None:
        try:
            stack_process.wait_until_ready(program, tell)
        except stack_process.EndedEarly:
            if program in missing:
                raise
            _make_way(site, program)  # it was ending when we looked: a killed process lives on for a moment
            missing.append(program)
            start(program)
            stack_process.wait_until_ready(program, tell)
        if program in missing:
            where = f" at {program.url}" if program.url else ""
            tell(f"{program.name}: ready{where} after {time.monotonic() - begun:.0f} s")

    for program in missing:
        start(program)
    with ThreadPoolExecutor(len(wave)) as pool:
        for done in [pool.submit(follow, program) for program in wave]:
            done.result()


def _mlflow_database(site: Site) -> str:
    return f"sqlite:///{site.home / 'mlflow' / 'mlflow.sqlite3'}"


def _migrate_mlflow(site: Site, tell: Say) -> None:
    """Bring an older database to this MLflow's schema, before any process opens it. A new one is made by the server."""
    folder = site.home / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    (site.home / "prefect").mkdir(parents=True, exist_ok=True)
    marker, installed = folder / "version", version("mlflow")
    if (folder / "mlflow.sqlite3").exists() and (not marker.exists() or marker.read_text() != installed):
        tell(f"mlflow: bringing its database to {installed}")
        command = [sys.executable, "-m", "mlflow", "db", "upgrade", _mlflow_database(site)]
        done = run(command, capture_output=True, text=True, check=False, env={**os.environ, **client_variables(site)})
        if done.returncode != 0:
            raise MansardError(f"mlflow db upgrade failed: {done.stderr.strip().splitlines()[-1:]}")
    marker.write_text(installed)


def _socket_answers(path: Path, question: str) -> bool:
    try:
        HostClient(path).call("GET", question, timeout_seconds=2.0)
    except MansardError:
        return False
    return True


def _is_fresh(sign_of_life: Path) -> bool:
    """Whether the file was written lately: both programs without a socket rewrite theirs all the time."""
    try:
        return time.time() - sign_of_life.stat().st_mtime < FRESH_SECONDS
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _stack_lock(site: Site, tell: Say) -> Iterator[None]:
    site.run.mkdir(parents=True, exist_ok=True)
    with (site.run / "stack.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell("another command is starting or stopping the stack: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
