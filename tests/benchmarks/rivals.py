"""Other programs in front of an instant engine, for side-by-side figures: LiteLLM's proxy and HAProxy, one core each.

Each is a context manager that gives the port it answers on, or None where the program is not installed.
"""

import contextlib
import http.client
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LITELLM = ROOT / ".venv-litellm/bin/litellm"
START_SECONDS = 180.0
LITELLM_CONFIG = """
model_list:
  - model_name: tiny
    litellm_params: {{model: openai/tiny, api_base: "http://127.0.0.1:{engine}/v1", api_key: none}}
litellm_settings: {{telemetry: false}}
"""
HAPROXY_CONFIG = """
global
  nbthread 1
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
frontend users
  bind 127.0.0.1:{port}
  default_backend engines
backend engines
  balance hdr(x-mansard-session)
  hash-type consistent
  http-reuse always
  server one 127.0.0.1:{engine}
"""


def on_core(core: int | None, command: Sequence[str]) -> list[str]:
    """The command on one core, where there are several."""
    return list(command) if core is None else ["taskset", "-c", str(core), *command]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def litellm(engine_port: int, folder: Path, core: int | None) -> Iterator[int | None]:
    """One worker without a database. Its package needs the system's libsndfile (apt-get install libsndfile1)."""
    if not LITELLM.exists():
        yield None
        return
    config, port = folder / "litellm.yaml", free_port()
    config.write_text(LITELLM_CONFIG.format(engine=engine_port))
    command = (str(LITELLM), "--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1")
    # Its price list comes with the package; without this it would be fetched.
    variables = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "NO_PROXY": "127.0.0.1"}
    with _running(on_core(core, command), folder / "litellm.log", variables) as child:
        _wait_until_it_answers(port, "/health/liveliness", child, folder / "litellm.log")
        yield port


@contextlib.contextmanager
def haproxy(engine_port: int, folder: Path, core: int | None) -> Iterator[int | None]:
    """One thread, the same sticky header."""
    program = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
    if program is None:
        yield None
        return
    config, port = folder / "haproxy.cfg", free_port()
    config.write_text(HAPROXY_CONFIG.format(port=port, engine=engine_port))
    with _running(on_core(core, (program, "-db", "-f", str(config))), folder / "haproxy.log", {}) as child:
        _wait_until_it_answers(port, "/_seen", child, folder / "haproxy.log")
        yield port


@contextlib.contextmanager
def _running(
    command: Sequence[str], log: Path, variables: dict[str, str]
) -> Iterator["subprocess.Popen[bytes]"]:
    with log.open("wb") as file, subprocess.Popen(
        command, stdout=file, stderr=file, env={**os.environ, **variables}
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def _wait_until_it_answers(port: int, path: str, child: "subprocess.Popen[bytes]", log: Path) -> None:
    """SystemExit with the program's last words where it ended."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", path)
            if connection.getresponse().status == 200:
                return
        except (OSError, http.client.HTTPException):
            assert time.monotonic() < deadline, f"port {port} did not answer in {START_SECONDS} s"
            if child.poll() is not None:
                words = log.read_text(errors="replace").strip().splitlines()[-1:]
                raise SystemExit(f"{log.stem} ended with status {child.returncode}: {''.join(words)}") from None
            time.sleep(0.1)
        finally:
            connection.close()
