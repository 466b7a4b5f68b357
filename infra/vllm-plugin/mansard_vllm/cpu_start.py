"""A shorter start of an API server on a CPU: one process imports vLLM instead of three.

vLLM's CPU platform spawns the EngineCore from the API server and the worker from the EngineCore; each imports vLLM
again: 37 of the 43 s that a start takes on two cores (2026-11-26, vLLM 0.32). It does so because OpenMP reads how many
threads it may have, and on which cores, when it is loaded. Here the EngineCore is forked from the API server, which has
run nothing in parallel by then, and is its own worker; its threads are bound as vLLM would bind them (cpu_worker.py).

Only where MANSARD_ONE_IMPORT=1 asks for it, for one worker with bound threads on vLLM's plain CPU platform: a GPU,
several workers or an executor named by hand start as vLLM starts them. Not for vLLM inside a program that computes with
torch itself: threads it has started would be missing after the fork.
"""

import multiprocessing
import os
from typing import TYPE_CHECKING

import torch
from vllm import envs
from vllm.platforms.cpu import CpuPlatform

from mansard_vllm.after_fork import let_go

if TYPE_CHECKING:  # vllm.config asks for the platform while it is imported
    from vllm.config import VllmConfig

WORKER = "mansard_vllm.cpu_worker.BoundWorker"


class OneImportPlatform(CpuPlatform):  # type: ignore[misc]
    """vLLM's CPU platform, but for how its processes start."""

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """vLLM's own settings, then ours; the EngineCore asks again, of the config it was forked with."""
        is_ours = _is_one_bound_worker(vllm_config)
        super().check_and_update_config(vllm_config)
        if not is_ours:
            return
        parallel = vllm_config.parallel_config
        parallel.distributed_executor_backend, parallel.worker_cls = "uni", WORKER
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        if multiprocessing.parent_process() is None:
            torch.set_num_threads(1)  # a pool of threads would not outlive the fork, and OpenMP would wait for it
            os.register_at_fork(after_in_child=let_go)


def _is_one_bound_worker(vllm_config: "VllmConfig") -> bool:
    parallel = vllm_config.parallel_config
    return (
        parallel.distributed_executor_backend == "uni"  # vLLM's own choice for one worker, before the CPU's makes it mp
        and parallel.world_size_across_dp == 1
        and parallel.worker_cls in ("auto", WORKER)
        and not parallel.numa_bind
        and envs.VLLM_ENABLE_V1_MULTIPROCESSING
        and envs.VLLM_CPU_OMP_THREADS_BIND != "nobind"
    )
