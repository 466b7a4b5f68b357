"""vLLM's CPU worker in a process that had OpenMP loaded before its cores were known: it binds the threads itself.

As vLLM binds those of a worker it spawns: as many threads as cores, one on each, the first being the one that calls.
"""

import os
from pathlib import Path

import torch
from vllm.config import VllmConfig
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.worker.cpu_worker import CPUWorker

ELEMENTS_PER_THREAD = 1 << 17
"""Four times what torch gives a thread at least (at::internal::GRAIN_SIZE): enough that every thread gets a part."""
THREADS = Path("/proc/self/task")


class BoundWorker(CPUWorker):  # type: ignore[misc]
    """Binds before anything is allocated: vLLM takes memory of the node that the calling thread is on."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        local_rank: int,
        rank: int,
        distributed_init_method: str,
        is_driver_worker: bool = False,
    ) -> None:
        bind(OMPProcessManager(vllm_config).cpu_lists[0])
        super().__init__(vllm_config, local_rank, rank, distributed_init_method, is_driver_worker)


def bind(cores: list[int]) -> None:
    """Give the calling thread one OpenMP thread a core, itself on the first. Its pool must not have started before."""
    before = _threads()
    torch.set_num_threads(len(cores))
    torch.ones(ELEMENTS_PER_THREAD * len(cores)).add_(1)
    started = sorted(_threads() - before)
    if len(started) != len(cores) - 1:
        raise RuntimeError(f"OpenMP started {len(started)} threads for cores {cores}, not {len(cores) - 1}")
    for thread, core in zip(started, cores[1:], strict=True):
        os.sched_setaffinity(thread, {core})
    os.sched_setaffinity(0, {cores[0]})


def _threads() -> set[int]:
    return {int(entry.name) for entry in THREADS.iterdir()}
