"""A forked worker is what an executed one is: same bytes, same errors, same ends. One server for all tests here."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mansard import launch
from mansard.errors import BadInput, StageFailed
from mansard.launch import Request, recipe_of, this_interpreter
from mansard.records import Derivation, SnapshotId
from mansard.site import Site
from mansard.specs.surgery import Expand
from mansard.store.store import Store
from mansard.worker_start import fork_servers
from tests.mansard.test_launch import quantization
from tests.mansard.training.conftest import Fill, slice_

ROOT = Path(__file__).resolve().parents[3]
DEADLINE_SECONDS = 900.0
PROBE = {"probe_tokens": 4, "seed": 0, "form": "logits"}
CALLER = """
import json, sys
from pathlib import Path
from mansard.launch import Request, derive, this_interpreter
from mansard.site import Site
from mansard.store.store import Store
from mansard.worker_start import fork_servers
root, home, stage, inputs, spec = sys.argv[1], Path(sys.argv[2]), sys.argv[3], *map(json.loads, sys.argv[4:])
site = Site(Path("-"), home, home, ("m",), {"main": this_interpreter(Path(root))}, {"default": "main"})
with fork_servers(site, "train"):
    print(derive(Store(site.store), site, Request(stage, inputs, spec)).snapshot)
"""


SERVER_OF_WORKERS_THAT_EXIT = """
import os, sys
from mansard import fork_server, worker
fork_server.STEPS = fork_server.IMPORTED = ()
fork_server._check_devices = lambda *_: os._exit(0)
worker.main = lambda *_: os._exit(7)
sys.exit(fork_server.main(int(sys.argv[1])))
"""


def new_site(home: Path) -> Site:
    home.mkdir(parents=True)
    return Site(home / "site.yaml", home, home, ("m",), {"main": this_interpreter(ROOT)}, {"default": "main"})


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A block in which workers of this interpreter are forked."""
    site = new_site(tmp_path_factory.mktemp("servers") / "home")
    os.environ.pop("PYTEST_CURRENT_TEST", None)
    with fork_servers(site, "train"):
        yield site


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return new_site(tmp_path / "home")


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"never: {what}")


def derive(store: Store, site: Site, request: Request) -> Derivation:
    """pytest names test and phase in a variable, and a server forks only workers with its own variables."""
    os.environ.pop("PYTEST_CURRENT_TEST", None)
    return launch.derive(store, site, request)


def processes(mark: str, home: Path | None = None) -> dict[int, int]:
    """Parents by process id, of processes with these words on their command line (all from Mansard's interpreter)."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
                parent = int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            if mark in command and (home is None or str(home) in command):
                parents[int(entry.name)] = parent
    return parents


def workers_of(site: Site) -> dict[int, int]:
    return processes("mansard.worker\0", site.home)


def proof(store: Store, make_checkpoint: Any, blocks: int = 1) -> Request:
    from mansard.models.expand import apply, plan
    from mansard.models.model_files import model_config

    base = store.snapshot(make_checkpoint(depth=2))
    expansion = apply(store, base, plan(model_config(store, base), Expand(blocks=blocks)))
    return Request("prove", {"base": base, "expansion": expansion}, PROBE)


def in_threads(*works: Callable[[], Any]) -> list[Any]:
    """Results of works that run at the same time, as the flow's tasks do."""
    with ThreadPoolExecutor(len(works)) as pool:
        return [f.result(DEADLINE_SECONDS) for f in [pool.submit(copy_context().run, work) for work in works]]


@pytest.mark.slow
def test_a_forked_worker_makes_the_bytes_of_an_executed_one(
    site: Site, tmp_path: Path, fill: Fill, request: pytest.FixtureRequest
) -> None:
    def made(at: Site) -> list[SnapshotId]:
        store = Store(at.store)
        trained = Request("train", fill(store), slice_(6))
        return [derive(store, at, one).snapshot for one in (trained, quantization(store, tmp_path))]

    executed = made(site)
    servers = request.getfixturevalue("servers")
    forked = made(elsewhere := new_site(tmp_path / "elsewhere"))
    assert forked == executed
    assert list((servers.logs / "stages").glob("*fork-server*"))
    assert len(list((elsewhere.logs / "stages").glob("*.log"))) == 2


def test_two_workers_at_once_are_children_of_the_server_with_their_own_command_lines(
    servers: Site, site: Site, make_checkpoint: Any
) -> None:
    store = Store(site.store)
    requests = [proof(store, make_checkpoint, blocks) for blocks in (1, 2)]
    first, second = (recipe_of(one, site.environments["main"].lock) for one in requests)
    seen: list[dict[int, int]] = []

    def look() -> None:
        with store.lock(first), store.lock(second):
            started.set()
            wait_for(lambda: len(workers_of(site)) == 2, "both workers wait for their recipe's lock")
            seen.append(workers_of(site))
            groups.extend(os.getpgid(pid) for pid in workers_of(site))

    started = threading.Event()
    groups: list[int] = []

    def work(one: Request) -> Callable[[], Any]:
        def run() -> Any:
            started.wait(DEADLINE_SECONDS)
            return derive(store, site, one)

        return run

    made = in_threads(look, *(work(one) for one in requests))[1:]
    assert [d.reused for d in made] == [False, False]
    (server,) = set(seen[0].values())
    assert server in processes("mansard.fork_server")
    assert sorted(groups) == sorted(seen[0])  # each leads a group of its own
    assert workers_of(site) == {}
    logs = {Path(d.log).read_text() for d in made}
    assert len({d.log for d in made}) == 2 and all("Traceback" not in text for text in logs)


def test_what_a_forked_stage_refuses_is_its_own_error_with_a_traceback_in_its_own_log(
    servers: Site, site: Site, make_checkpoint: Any
) -> None:
    store = Store(site.store)
    request = proof(store, make_checkpoint)
    other = store.snapshot(make_checkpoint(depth=3))
    with pytest.raises((StageFailed, BadInput)) as failure:
        derive(store, site, replace(request, inputs={**request.inputs, "base": other}))
    (log,) = (site.logs / "stages").glob("*.log")
    assert "Traceback" in log.read_text()
    assert type(failure.value).__name__ in log.read_text()


def test_a_forked_stage_over_its_time_is_ended_with_its_group(
    servers: Site, site: Site, make_checkpoint: Any
) -> None:
    store = Store(site.store)
    with pytest.raises(StageFailed, match="ran over 0 s and was ended"):
        derive(store, replace(site, stage_timeout_seconds=0), proof(store, make_checkpoint))
    assert workers_of(site) == {}


def test_a_signal_that_ends_a_forked_worker_is_its_exit_status(
    servers: Site, site: Site, make_checkpoint: Any
) -> None:
    store = Store(site.store)
    request = proof(store, make_checkpoint)

    def kill() -> None:
        (pid,) = wait_for(lambda: list(workers_of(site)), "the worker")
        os.kill(pid, signal.SIGTERM)

    with (
        store.lock(recipe_of(request, site.environments["main"].lock)),
        pytest.raises(StageFailed, match="exit status -15"),
    ):
        in_threads(lambda: derive(store, site, request), kill)


def test_a_forked_worker_that_a_library_ends_has_the_status_that_it_ended_with(
    site: Site, make_checkpoint: Any, tmp_path: Path
) -> None:
    python, server = tmp_path / "python", tmp_path / "server.py"
    server.write_text(SERVER_OF_WORKERS_THAT_EXIT)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {server} "$3"\n')
    python.chmod(0o755)
    other = replace(site, environments={"main": replace(site.environments["main"], python=python)})
    os.environ.pop("PYTEST_CURRENT_TEST", None)
    with fork_servers(other, "train"), pytest.raises(StageFailed, match="ended with exit status 7: "):
        derive(Store(site.store), other, proof(Store(site.store), make_checkpoint))


def test_other_variables_than_the_servers_execute_the_worker_and_those_of_clients_do_not(
    servers: Site, site: Site, make_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parent_of_worker(blocks: int, name: str) -> int:
        request = proof(store, make_checkpoint, blocks)
        with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
            patch.setenv(name, "1")
            stack.enter_context(store.lock(recipe_of(request, site.environments["main"].lock)))

            def look() -> int:
                workers = wait_for(lambda: workers_of(site), "the worker")
                stack.close()
                return int(next(iter(workers.values())))

            return int(in_threads(lambda: derive(store, site, request), look)[1])

    store = Store(site.store)
    assert parent_of_worker(1, "MLFLOW_X") in processes("mansard.fork_server")
    assert parent_of_worker(2, "OMP_NUM_THREADS") == os.getpid()


def test_the_caller_killed_ends_its_server_and_the_forked_worker(site: Site, make_checkpoint: Any) -> None:
    store = Store(site.store)
    request = proof(store, make_checkpoint)
    with store.lock(recipe_of(request, site.environments["main"].lock)):
        words = [str(ROOT), str(site.home), request.stage, json.dumps(dict(request.inputs))]
        caller = subprocess.Popen([sys.executable, "-c", CALLER, *words, json.dumps(dict(request.spec))])
        workers = wait_for(lambda: workers_of(site), "the worker waits for the recipe's lock")
        (server,) = workers.values()
        assert processes("mansard.fork_server")[server] == caller.pid
        os.kill(caller.pid, signal.SIGKILL)
        caller.wait()
        wait_for(lambda: not workers_of(site), "the worker ended with its caller")
        wait_for(lambda: server not in processes("mansard.fork_server"), "so did the server")


def test_a_server_that_dies_leaves_its_worker_at_work_and_the_next_is_executed(
    site: Site, make_checkpoint: Any
) -> None:
    store = Store(site.store)
    first, second = (proof(store, make_checkpoint, blocks) for blocks in (1, 2))
    lock = store.lock(recipe_of(first, site.environments["main"].lock))
    lock.__enter__()

    def kill_server() -> None:
        workers = wait_for(lambda: workers_of(site), "the worker")
        os.kill(next(iter(workers.values())), signal.SIGKILL)
        lock.__exit__(None, None, None)

    os.environ.pop("PYTEST_CURRENT_TEST", None)
    with fork_servers(site, "train"):
        made, _ = in_threads(lambda: derive(store, site, first), kill_server)
        again = derive(store, site, second)
    assert (made.reused, again.reused) == (False, False)


def test_a_server_that_cannot_start_is_no_trouble(site: Site, make_checkpoint: Any, tmp_path: Path) -> None:
    """Its interpreter has no module of the server; a worker's command it runs."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$2" = mansard.fork_server ] && exit 1\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    other = replace(site, environments={"main": replace(site.environments["main"], python=python)})
    store = Store(site.store)
    os.environ.pop("PYTEST_CURRENT_TEST", None)
    with fork_servers(other, "train"):
        assert derive(store, other, proof(store, make_checkpoint)).reused is False
    missing = replace(site, environments={"main": replace(site.environments["main"], python=tmp_path / "none")})
    with fork_servers(missing, "train"), pytest.raises(StageFailed, match="cannot start"):
        derive(store, missing, proof(store, make_checkpoint, 2))


def test_stages_that_wait_for_no_server_import_no_torch() -> None:
    code = (
        "import sys, importlib\nfrom mansard.stages import declaration\n"
        "from mansard.worker_start import WITHOUT_TORCH\n"
        "for stage in sorted(WITHOUT_TORCH):\n    importlib.import_module(declaration(stage).module)\n"
        "print('torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "False"
