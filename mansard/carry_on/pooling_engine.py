"""An inference node of one's own: vLLM in pooling mode on an artifact, for as long as a capture lasts.

It stays in the process group of the stage that started it, so it ends with the stage whatever happens. Where the site
names nodes, none is started.
"""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mansard.carry_on.nodes import Node, NodeFailed
from mansard.errors import StageFailed
from mansard.serving.engine.command import free_port
from mansard.serving.engine.log import last_words

POLL_SECONDS = 0.5
STOP_SECONDS = 30.0
SERVED_NAME = "base"


@contextlib.contextmanager
def pooling_engine(
    tree: Path, start: Mapping[str, Any], serve: Mapping[str, Any], log: Path, overrides: Mapping[str, Any]
) -> Iterator[Node]:
    """A node on `tree`. `start`: {"python", "variables", "arguments", "first_port", "timeout_seconds"}; `serve` as
    specs.Serve; `overrides`: what config.json says otherwise. StageFailed with the engine's last words where it does
    not come up."""
    port = free_port(start["first_port"], ())
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as log_file:
        process = subprocess.Popen(
            command(tree, port, start, serve, overrides),
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **start["variables"]},
            cwd=log.parent,
        )
    try:
        node = Node(f"http://127.0.0.1:{port}", SERVED_NAME)
        _wait(process, node, log, float(start["timeout_seconds"]))
        yield node
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def command(
    tree: Path, port: int, start: Mapping[str, Any], serve: Mapping[str, Any], overrides: Mapping[str, Any]
) -> list[str]:
    """vLLM's API server in pooling mode; prefix caching is off, because a cached token has no state to give."""
    return [
        str(start["python"]),
        "-m",
        "vllm.entrypoints.openai.api_server",
        f"--model={tree}",
        f"--served-model-name={SERVED_NAME}",
        "--host=127.0.0.1",
        f"--port={port}",
        "--runner=pooling",
        '--pooler-config={"task": "token_embed", "use_activation": false}',
        "--no-enable-prefix-caching",
        f"--dtype={serve['dtype']}",
        f"--max-model-len={serve['max_model_len']}",
        f"--tensor-parallel-size={serve['tensor_parallel']}",
        *([f"--hf-overrides={json.dumps(dict(overrides))}"] if overrides else []),
        *(["--enforce-eager"] if serve["enforce_eager"] else []),
        "--seed=0",
        "--no-enable-log-requests",
        "--disable-uvicorn-access-log",
        *start["arguments"],
    ]


def _wait(process: "subprocess.Popen[bytes]", node: Node, log: Path, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    while process.poll() is None:
        try:
            node.models()
            return
        except NodeFailed:
            if time.monotonic() > deadline:
                raise StageFailed(
                    f"the capture's engine did not answer in {timeout_seconds:.0f} s: {last_words(log)}"
                ) from None
        time.sleep(POLL_SECONDS)
    raise StageFailed(f"the capture's engine ended with {process.returncode}: {last_words(log)}; its log: {log}")
