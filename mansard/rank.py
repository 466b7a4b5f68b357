"""`python -m mansard.rank REQUEST.json`: one rank of a training, started by a launcher that sets RANK.

It tells the stage's process by its beat file what it is about to do, and ends when that process is gone. Rank 0 writes
checkpoints, progress and what was learned.
"""

import functools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors.torch import save_file
from torch import distributed

from mansard.canonical import canonical_json, write_atomically
from mansard.errors import BadInput, MansardError, StageFailed
from mansard.store.store import Store
from mansard.training.deepspeed_engine import DeepSpeedEngine
from mansard.training.learning import Learned, learn
from mansard.training.rank_files import START, RankFiles
from mansard.training.state import Checkpoints, Cursor
from mansard.worker import StageContext

LOOK_SECONDS = 1.0
ALONE_SECONDS = 180.0
"""So long unfollowed, and a rank on another host ends: well above what a shared folder caches a file's times for."""


class ReadCheckpoints(Checkpoints):
    """Every rank reads the newest checkpoint; rank 0 alone writes them."""

    def write(self, cursor: Cursor, tensors: Any) -> None:  # noqa: ANN401
        return


class Told:
    """Progress of rank 0, for the stage's process to pass on; the others say nothing."""

    def __init__(self, files: RankFiles, rank: int) -> None:
        self._files, self._rank = files, rank

    def send(self, message: dict[str, Any]) -> None:
        if self._rank == 0 and "progress" in message:
            write_atomically(self._files.progress, json.dumps(message["progress"]).encode())


def main(request_file: str) -> int:
    """Returns the exit status of the error, which the stage's process raises again."""
    asked = json.loads(Path(request_file).read_text())
    rank = int(os.environ["RANK"])
    files = RankFiles(Path(asked["work"]))
    sys.excepthook = functools.partial(_end_with_word, files, rank)
    _end_with(asked["host"], asked["parent"], files, rank)
    signal.signal(signal.SIGTERM, lambda *_: _end_as_victim(files, rank))
    files.beat(rank, START)
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # Only DeepSpeed's inference calls it; compiling it takes a minute, and one killed leaves a lock all wait for.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(
            "nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(seconds=2 * asked["hang_seconds"])
        )
        if distributed.get_world_size() != asked["processes"]:
            started = f"the launcher started {distributed.get_world_size()} ranks"
            raise BadInput(f"{started}, the site's training.processes says {asked['processes']}; make them equal")
        store = Store(Path(asked["store"]), asked["store_url"])
        work = Path(asked["work"])
        context = StageContext(store, asked["recipe"], asked["inputs"], asked["spec"], {}, work, Told(files, rank))
        checkpoints = Checkpoints(work) if rank == 0 else ReadCheckpoints(work)

        def make_engine(model: Any, groups: Any, train: Any, anchor: Any) -> DeepSpeedEngine:  # noqa: ANN401
            return DeepSpeedEngine(model, groups, train, asked["config"], lambda what: files.beat(rank, what), anchor)

        learned = learn(context, make_engine, _forecast, checkpoints)
        if rank == 0:
            _keep(files, learned)
        files.beat(rank, "done")
    except MansardError as error:
        traceback.print_exc()
        files.fail(rank, error)
        return error.exit_code
    return 0


def _forecast(*_: object) -> str:
    return f"{distributed.get_world_size()} ranks, memory is not forecast for several"


def _end_with_word(files: RankFiles, rank: int, kind: type[BaseException], error: BaseException, trace: Any) -> None:  # noqa: ANN401
    """What nobody expected ends the rank, and the stage's process can say what it was."""
    traceback.print_exception(kind, error, trace)
    words = f"{kind.__name__}: {str(error).partition(chr(10))[0]}"
    files.fail(rank, StageFailed(words), is_victim=isinstance(error, RuntimeError) and "peer" in words)
    sys.stderr.flush()
    os._exit(1)


def _keep(files: RankFiles, learned: Learned) -> None:
    tensors = {f"trained/{name}": tensor.contiguous() for name, tensor in learned.trained.items()}
    save_file({**tensors, "probe": learned.probe_BT, "seen": learned.seen_BTV.contiguous()}, files.tensors)
    told = {
        "fractions": learned.fractions,
        "curve": learned.curve,
        "frozen": learned.frozen,
        "blocks": [[b.index, b.source] for b in learned.blocks],
    }
    write_atomically(files.learned, canonical_json(told))


def _end_as_victim(files: RankFiles, rank: int) -> None:
    """The launcher ends what is left after a rank failed."""
    files.fail(rank, StageFailed("ended by its launcher"), is_victim=True)
    os._exit(1)


def _end_with(host: str, parent: int, files: RankFiles, rank: int) -> None:
    """End when the stage's process is gone: a launcher may have put this rank into a session of its own."""

    def watch() -> None:
        seen, since = files.last_followed(), time.monotonic()
        while True:
            if (followed := files.last_followed()) != seen:
                seen, since = followed, time.monotonic()
            is_here = host == socket.gethostname()
            if not (Path(f"/proc/{parent}").exists() if is_here else time.monotonic() - since < ALONE_SECONDS):
                break
            files.alive(rank)
            time.sleep(LOOK_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    status = main(sys.argv[1])
    sys.stderr.flush()
    os._exit(status)  # collectives of a rank that ended have nothing more to say
