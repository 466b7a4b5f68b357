"""Hostile clients against the router and HAProxy with a normal client beside them: who is hurt, and for how long.

Each attack (hostile_clients.py) runs for `--seconds` in a process of its own from 127.0.0.1, against two fresh workers
with default limits and an instant engine; a normal client asks 20 times a second from 127.0.0.2 (with another tenant's
key where keys are on), meanwhile and until 12 s after. Failed is what has no 200 within two seconds. Row 8 alone has
shorter limits than the defaults, as it could not be seen in seconds. The last line is JSON:
worst_normal_failed_fraction, peak_mb (the largest worker's), recovered_fraction (attacks after which nothing fails 10 s
later), forged_decisions_fraction (bench_forged.py, of 100 simulated worlds).
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from sys import path as import_path
from typing import Any

from mansard.serving.haproxy.runtime import Runtime
from mansard.serving.split import Split, with_stable, write_split

import_path.insert(0, str(Path(__file__).parent))
from bench_forged import forged_decisions

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
QUIET_SECONDS, PAUSE_SECONDS = 2.0, 10.0
KEYS = ("hostile", "normal")
SHORT_LIMITS = ("--first-byte-seconds", "3", "--silent-seconds", "3")
SITE = """
format: 1
home: home
data: data
models: [{models}]
environments: {{main: {{python: /usr/bin/env, lock: none}}, serve: {{python: /usr/bin/env, lock: none}}}}
stages: {{default: main}}
ports: {{router: {port}}}
router: {{{router}}}
"""


@dataclass(frozen=True, slots=True)
class Case:
    """One attack on one data plane."""

    plane: str
    attack: str
    has_keys: bool = False
    models: tuple[str, ...] = ("tiny",)
    arguments: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.plane} {self.attack}{' with keys' if self.has_keys else ''}"


CASES = (
    *(Case("workers", "chunks", keys) for keys in (True, False)),
    *(Case("workers", "chunks_64", keys) for keys in (True,)),
    *(Case("workers", "bodies", keys) for keys in (True, False)),
    Case("workers", "small_bodies"),
    *(Case("workers", attack) for attack in ("answers", "streams", "idle", "leavers")),
    *(Case("workers", "places", keys) for keys in (True, False)),
    Case("workers", "json_bodies", models=("tiny", "other")),
    Case("workers", "stalls", has_keys=True, arguments=SHORT_LIMITS),
    *(Case("haproxy", attack) for attack in ("chunks", "bodies", "answers", "streams", "places", "idle", "gigabyte")),
)


@contextlib.contextmanager
def started(*command: str) -> Iterator[tuple["subprocess.Popen[bytes]", dict[str, Any]]]:
    """A child that says in a line of JSON that it is ready; its group ends with the context."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    ) as child:
        try:
            assert child.stdout is not None
            yield child, json.loads(child.stdout.readline())
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


@contextlib.contextmanager
def data_plane(case: Case, folder: Path, engine_port: int) -> Iterator[tuple[int, list[int]]]:
    """Its port, and the processes whose memory counts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    router = "workers: 2" if case.plane == "workers" else "plane: haproxy"
    text = SITE.format(models=", ".join(case.models), port=port, router=router)
    if case.has_keys:
        (folder / "keys.yaml").write_text(
            "".join(f'{key}: "{hashlib.sha256(key.encode()).hexdigest()}"\n' for key in KEYS)
        )
        text += "api_keys: keys.yaml\n"
    (folder / "site.yaml").write_text(text)
    split = Split()
    for model in case.models:
        split = with_stable(split, model, 1, f"http://127.0.0.1:{engine_port}", model, 1)
    write_split(folder / "home/split.json", split)
    module = "router.supervisor" if case.plane == "workers" else "haproxy.driver"
    command = ("-m", f"mansard.serving.{module}", "--lease-seconds", "86400", "--site", str(folder / "site.yaml"))
    with started(*command, *case.arguments) as (child, _):
        if case.plane == "workers":
            yield port, children_of(child.pid)
            return
        pid = Runtime(folder / "home/run/haproxy.sock", folder, folder).pid()
        try:
            yield port, [pid]
        finally:
            os.kill(pid, signal.SIGKILL)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def peak_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


def measured(case: Case, seconds: float) -> dict[str, Any]:
    """One case: what the normal client saw, and the largest process."""
    clients = str(HERE / "hostile_clients.py")
    with (
        tempfile.TemporaryDirectory(prefix="hostile-", ignore_cleanup_errors=True) as name,
        started(str(HERE / "instant_engine.py")) as (_, engine),
        data_plane(case, Path(name), engine["port"]) as (port, processes),
    ):
        keys = KEYS if case.has_keys else ("", "")
        total = str(seconds + PAUSE_SECONDS + QUIET_SECONDS)
        command = [sys.executable, clients, "normal", "--port", str(port), "--key", keys[1], "--seconds", total]
        attack = [sys.executable, clients, case.attack, "--port", str(port), "--key", keys[0]]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
            subprocess.run([*attack, "--seconds", str(seconds - 1)], check=False, timeout=seconds + 60)
            assert client.stdout is not None
            figures: dict[str, Any] = json.loads(client.stdout.read())
        return {**figures, "peak_mb": max(map(peak_mb, processes))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each attack")
    parser.add_argument("--only", default="", help="cases whose name holds these words")
    parser.add_argument("--no-short-limits", action="store_true", help="for a router that has no such options")
    options = parser.parse_args()
    if shutil.which("haproxy") is None and shutil.which("haproxy", path="/usr/sbin") is None:
        print("HAProxy is not installed (apt-get install haproxy); its cases are left out")
        cases = [case for case in CASES if case.plane != "haproxy"]
    else:
        cases = list(CASES)
    figures = []
    for case in cases:
        if options.only not in case.name:
            continue
        short = Case(case.plane, case.attack, case.has_keys, case.models) if options.no_short_limits else case
        figure = measured(short, options.seconds)
        figures.append(figure)
        print(
            f"{case.name:28} failed {figure['failed_fraction']:6.1%}  p50 {figure['p50_ms']:7.1f} ms  peak"
            f" {figure['peak_mb']:6.0f} MB  {'recovered' if figure['is_recovered'] else 'NOT RECOVERED'}"
            f"  {figure['problem']}",
            flush=True,
        )
    summary = {
        "worst_normal_failed_fraction": round(max(f["failed_fraction"] for f in figures), 4),
        "peak_mb": round(max(f["peak_mb"] for f in figures)),
        "recovered_fraction": sum(f["is_recovered"] for f in figures) / len(figures),
        "forged_decisions_fraction": forged_decisions(1000, 100),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
