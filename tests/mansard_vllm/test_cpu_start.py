"""How the vLLM plugin has an engine start on a CPU, in the serving environment's Python; no engine is started."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mansard.demo.base import save_base, train_tokenizer, untrained_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"vocabulary": 300, "hidden": 128, "intermediate": 256, "blocks": 1, "heads": 2, "max_tokens": 128}
CORES = sorted(os.sched_getaffinity(0))[:2]
OURS = ["uni", "mansard_vllm.cpu_worker.BoundWorker", "fork"]
VLLMS = ["mp", "vllm.v1.worker.cpu_worker.CPUWorker", "spawn"]


def test_one_bound_worker_is_forked_with_a_thread_on_each_core_and_nothing_else_is(tmp_path: Path) -> None:
    save_base(untrained_model(SHAPE, 0), train_tokenizer(["some words " * 30], 300, 128), tmp_path / "base")
    cores = ",".join(map(str, CORES))
    bound, unbound = {"VLLM_CPU_OMP_THREADS_BIND": cores}, {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    two, by_hand = {"tensor_parallel_size": 2}, {"distributed_executor_backend": "mp"}
    found = told(tmp_path / "base", cores, [({}, unbound), (two, bound), (by_hand, bound), ({}, bound)])
    assert found["cases"] == [VLLMS, VLLMS, VLLMS, OURS]
    assert (found["threads"], found["bound"]) == (len(CORES), [[core] for core in CORES])
    assert found["is_port_closed"], "a killed API server's port refuses at once, though its EngineCore still runs"
    assert found["platform_unasked"] is None


def told(model: Path, cores: str, cases: Sequence[tuple[Mapping[str, Any], dict[str, str]]]) -> dict[str, Any]:
    """All in one process, because importing vLLM is what takes long."""
    run = subprocess.run(
        [ROOT / ".venv-serve/bin/python", Path(__file__).with_name("start_in_vllm.py"), model, cores],
        input=json.dumps(cases), capture_output=True, text=True, check=False, timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT / "infra/vllm-plugin"), "HF_HUB_OFFLINE": "1",
             "MANSARD_ONE_IMPORT": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found
