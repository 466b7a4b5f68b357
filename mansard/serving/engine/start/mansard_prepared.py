"""`python -m mansard_prepared ARCHITECTURE`: imports vLLM, then waits on its standard input for the engine to be.

One JSON line, {"command": [PYTHON, "-m", MODULE, ARGUMENTS...], "variables": {...}, "log": FILE}, makes it that
process: same module as __main__, same arguments, variables, log and command line, only imported already. An input that
closes ends it. On a GPU the EngineCore is then forked from it, which saves one more import, unless the variables name
another way or CUDA was touched; vLLM checks the latter again. (On a CPU our plugin decides: cpu_start.py.)
Does not cover: what vLLM reads of the variables while it is imported: they are those of the site's other engines.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import runpy
import sys

MODULES = (
    "vllm.entrypoints.openai.api_server",
    "vllm.entrypoints.launchers.api_server.entry",  # where newer ones have what the former had
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
)
METHOD = "VLLM_WORKER_MULTIPROC_METHOD"


def main(architecture: str) -> None:
    began_with = dict(os.environ)
    for module in MODULES:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(module)
    inspect(architecture)
    line = sys.stdin.readline()
    if not line:
        return
    message = json.loads(line)
    become(message["command"], message["variables"], message["log"], began_with)


def inspect(architecture: str) -> None:
    """vLLM asks a process of its own what a model class can do, once a cache folder; it asks it now."""
    with contextlib.suppress(ImportError, KeyError):
        from vllm.model_executor.models.registry import ModelRegistry

        ModelRegistry.models[architecture].inspect_model_cls()


def become(command: list[str], variables: dict[str, str], log: str, began_with: dict[str, str]) -> None:
    """Run the module of `command` as it would run there; returns when that does."""
    for name in began_with.keys() - variables.keys():
        os.environ.pop(name, None)
    os.environ.update({name: value for name, value in variables.items() if began_with.get(name) != value})
    for path, flags, number in (
        (os.devnull, os.O_RDONLY, 0),
        *((log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, number) for number in (1, 2)),
    ):
        descriptor = os.open(path, flags, 0o644)
        os.dup2(descriptor, number)
        os.close(descriptor)
    fork_on_a_gpu()
    with contextlib.suppress(ImportError):
        import setproctitle  # vLLM's

        setproctitle.setproctitle(" ".join(command))
    _, _, module, *arguments = command
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)  # what it imported stays
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def fork_on_a_gpu() -> None:
    """Have vLLM fork its EngineCore from here, where that is sound."""
    if METHOD in os.environ or multiprocessing.parent_process() is not None:
        return
    try:
        import torch
        from mansard_vllm.after_fork import let_go
        from vllm.platforms import current_platform
    except ImportError:  # a stand-in for vLLM, or an environment without our plugin
        return
    if current_platform.is_cuda() and not torch.cuda.is_initialized():
        os.environ[METHOD] = "fork"
        os.register_at_fork(after_in_child=let_go)


if __name__ == "__main__":
    main(sys.argv[1])
