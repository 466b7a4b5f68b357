"""`python -m mansard.worker STAGE REQUEST.json`: one process, one stage, one or more derivations.

It holds a lock named by each recipe while it works, so that a second caller waits and finds the result. It exits when
its parent's pipe closes. Messages to the parent are JSON lines on standard output; what the stage's libraries print
goes to standard error, which is the log.
"""

import importlib
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TextIO

from mansard.errors import MansardError, StageFailed
from mansard.records import SnapshotId
from mansard.stages import declaration
from mansard.store.store import Store

BEAT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class StageContext:
    """What a stage receives. `work` is a folder that survives a kill and is removed after success (checkpoints)."""

    store: Store
    recipe: str
    inputs: Mapping[str, SnapshotId]
    spec: Mapping[str, Any]
    where: Mapping[str, Any]
    work: Path
    channel: "Messages"

    def progress(self, done: float, total: float, unit: str, text: str = "", **metrics: float) -> None:
        """Tell the parent how far the work is; `metrics` go to MLflow at step `done`."""
        self.channel.send({"progress": {"done": done, "total": total, "unit": unit, "text": text, "metrics": metrics}})


class Messages(Protocol):
    """Where a stage's messages go: a parent process, or whoever runs the stage in this one."""

    def send(self, message: dict[str, Any]) -> None: ...


class Channel:
    """JSON lines to the parent, from any thread. A number of NumPy or torch is sent as Python's."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        with self._lock:
            self._stream.write(json.dumps(message, default=_plain) + "\n")
            self._stream.flush()


def _plain(value: Any) -> Any:  # noqa: ANN401 - json asks for what it does not know
    if not hasattr(value, "item"):
        raise TypeError(f"a stage's message holds a {type(value).__name__} ({value!r:.80}); send numbers and text")
    return value.item()


def main(stage: str, request_file: str) -> int:
    channel = Channel(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)
    _exit_with_parent()
    _beat(channel)
    message = json.loads(Path(request_file).read_text())
    try:
        _check_versions(stage, message["packages"])
        store = Store(Path(message["store"]), message.get("store_url"))
        module = importlib.import_module(declaration(stage).module)
        for request in message["requests"]:
            channel.send({"result": derive_here(store, stage, module.run, request, message["log"], channel)})
    except MansardError as error:
        traceback.print_exc()
        channel.send({"error": {"kind": type(error).__name__, "message": str(error)}})
        return error.exit_code
    return 0


def derive_here(
    store: Store, stage: str, run: Any, request: dict[str, Any], log: str, channel: Messages  # noqa: ANN401 - a stage
) -> dict[str, Any]:
    """One derivation in this process, under its recipe's lock; recalled where another made it meanwhile."""
    recipe = request["recipe"]
    with store.lease(request["inputs"].values()), store.lock(recipe):  # its inputs stay while it waits
        known = store.recall(recipe)
        if known is not None:
            return {"recipe": recipe, "snapshot": known, "reused": True, "seconds": 0.0}
        _seed_everything()
        started = time.monotonic()
        begun_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        work = store.work(recipe)
        context = StageContext(store, recipe, request["inputs"], request["spec"], request["where"], work, channel)
        snapshot = run(context)
        seconds = time.monotonic() - started
        lineage = {
            "format": 1,
            "stage": stage,
            "recipe": recipe,
            "inputs": request["inputs"],
            "spec": request["spec"],
            "code_version": declaration(stage).code_version,
            "begun_at": begun_at,
            "seconds": round(seconds, 3),
            "host": os.uname().nodename,
            "log": log,
        }
        store.remember(recipe, snapshot, lineage)
        store.discard_work(recipe)
        return {"recipe": recipe, "snapshot": snapshot, "reused": False, "seconds": seconds}


def _check_versions(stage: str, locked: dict[str, str]) -> None:
    """The recipe names the lock's versions, so the process must really run them."""
    for package, wanted in locked.items():
        found = version(package)
        if found.split("+")[0] != wanted.split("+")[0]:
            raise StageFailed(f"stage {stage}: {package} {found} is installed, the lock says {wanted}; run: make setup")


def _seed_everything() -> None:
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def _exit_with_parent() -> None:
    """End the whole process group when the parent's end of standard input closes."""

    def wait_for_end() -> None:
        while os.read(0, 1 << 16):  # not sys.stdin: its lock would be held when the interpreter ends
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait_for_end, daemon=True).start()


def _beat(channel: Channel) -> None:
    def beat() -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            channel.send({"beat": time.time()})

    threading.Thread(target=beat, daemon=True).start()


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # threads of the stage's libraries have nothing more to say
