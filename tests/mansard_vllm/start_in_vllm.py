"""Run by the serving environment's Python with MANSARD_ONE_IMPORT=1: prints as JSON how vLLM would start the engines of
the cases on standard input ([settings of ParallelConfig, environment variables] each), and how the threads of a process
forked then are bound, and whether it keeps a port open that its parent closes. Arguments: model, cores by comma."""

import errno
import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from mansard_vllm import cpu_platform
from mansard_vllm.cpu_worker import bind
from vllm.config import ModelConfig, ParallelConfig, VllmConfig


def main() -> None:
    model, cores = sys.argv[1:]
    cases = [start_of(model, settings, variables) for settings, variables in json.load(sys.stdin)]
    port = socket.create_server(("127.0.0.1", 0))
    ours, childs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=tell_threads, args=(cores, childs))
    child.start()
    threads, bound = ours.recv()
    address = port.getsockname()
    port.close()
    with socket.socket() as caller:
        is_port_closed = caller.connect_ex(address) == errno.ECONNREFUSED
    ours.send("end")
    child.join()
    del os.environ["MANSARD_ONE_IMPORT"]
    print(json.dumps({"cases": cases, "threads": threads, "bound": bound, "is_port_closed": is_port_closed,
                      "platform_unasked": cpu_platform()}))  # fmt: skip


def start_of(model: str, settings: dict[str, Any], variables: dict[str, str]) -> list[str]:
    """Executor, worker and the way processes are started."""
    os.environ.update(variables)
    parallel = VllmConfig(
        model_config=ModelConfig(model=model, dtype="float32"), parallel_config=ParallelConfig(**settings)
    ).parallel_config
    return [parallel.distributed_executor_backend, parallel.worker_cls, os.environ["VLLM_WORKER_MULTIPROC_METHOD"]]


def tell_threads(cores: str, parent: Any) -> None:
    """How many threads torch has, and the cores of each thread after binding, the calling one's first. Stays until
    it is told to end."""
    bind([int(core) for core in cores.split(",")])
    threads = sorted(int(entry.name) for entry in Path("/proc/self/task").iterdir())
    parent.send((torch.get_num_threads(), [sorted(os.sched_getaffinity(thread)) for thread in threads]))
    parent.recv()


if __name__ == "__main__":
    main()
