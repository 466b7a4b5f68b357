"""A training on several ranks: started by the site's launcher, followed, and cleared away when one of them fails.

Guarantees: a rank that dies or hangs is named, the others are ended, the last checkpoint stays, and no rank outlives
the stage's process. Ranks on other hosts need the stage's work folder and store under the same paths; there a dead rank
is known only by its silence. Does not cover: how ranks compute (deepspeed_engine.py).
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from mansard.errors import BadInput, MansardError, StageFailed, error_named
from mansard.models.storeys import NewBlock
from mansard.specs.training import Train
from mansard.training.learning import Learned
from mansard.training.loop import kept
from mansard.training.rank_files import START, RankBeat, RankFiles
from mansard.training.state import Checkpoints

if TYPE_CHECKING:
    from mansard.worker import StageContext

LOOK_SECONDS = 0.5
END_SECONDS = 10.0
START_SECONDS = 900.0
"""What a rank may take to import, read text and load its model, on a slow machine."""
STILL_SECONDS = 5.0
"""A process that did not say for so long that it runs stands still (it says so every second)."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """`config` is DeepSpeed's; `launcher` the words before `-m mansard.rank` (none: torchrun on this machine);
    a rank that says nothing for `hang_seconds` hangs."""

    processes: int
    config: Mapping[str, Any]
    hang_seconds: float = 1800.0
    launcher: tuple[str, ...] = field(default=())

    def command(self, request: Path) -> list[str]:
        own = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}"]
        return [*(self.launcher or own), "-m", "mansard.rank", str(request)]


def zero_level(config: Mapping[str, Any]) -> int:
    """Which ZeRO a DeepSpeed configuration asks for."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def check_ranks(train: Train, config: Mapping[str, Any], world: int) -> None:
    """BadInput where the spec's training cannot run on `world` ranks under this DeepSpeed configuration."""
    if train.batch_sequences % world:
        raise BadInput(
            f"train.batch_sequences {train.batch_sequences} is no multiple of the site's training.processes {world}"
        )
    if train.frozen == "fp8" and zero_level(config) == 3:
        raise BadInput("train.frozen: fp8 needs ZeRO 1 or 2 (its weights are buffers, which ZeRO 3 does not shard); "
                       "name another file under training.deepspeed, or frozen: bf16")  # fmt: skip
    if train.anchor is not None and zero_level(config) == 3:
        raise BadInput("train.anchor needs ZeRO 1 or 2: a rank without general text in a step would not gather the "
                       "blocks that ZeRO 3 shards, and the others would wait")  # fmt: skip
    if train.adapter is not None and train.adapter.method != "lora" and zero_level(config) == 3:
        reason = {"qlora": "its 4-bit weights are buffers, which ZeRO 3 does not shard",
                  "dora": "it reads weights outside their module's pass, when ZeRO 3 has them in pieces"}  # fmt: skip
        method = train.adapter.method
        raise BadInput(f"train.adapter.method: {method} needs ZeRO 1 or 2 ({reason[method]}); name another file under "
                       "training.deepspeed, or take lora")  # fmt: skip
    if (train.optimizer, train.master) != ("adamw", "fp32"):
        raise BadInput(f"optimizer: {train.optimizer} with master: {train.master} runs in one process; several ranks "
                       "take optimizer: adamw and master: fp32")  # fmt: skip


def learn_in_ranks(context: "StageContext", ranks: Ranks) -> Learned:
    """What `learn` returns, made by several processes. StageFailed names the rank that failed."""
    check_ranks(Train.model_validate(context.spec["train"]), ranks.config, ranks.processes)
    files = RankFiles(context.work)
    files.clear()
    request = files.folder / "request.json"
    asked = {
        "store": str(context.store.root), "store_url": context.store.url, "recipe": context.recipe,
        "inputs": dict(context.inputs), "spec": dict(context.spec), "work": str(context.work),
        "config": dict(ranks.config), "processes": ranks.processes, "hang_seconds": ranks.hang_seconds,
        "parent": os.getpid(), "host": socket.gethostname(),
    }  # fmt: skip
    request.write_text(json.dumps(asked))
    launcher = subprocess.Popen(ranks.command(request), stdin=subprocess.DEVNULL, stdout=sys.stderr)
    try:
        _follow(context, ranks, files, launcher)
    finally:
        _clear(launcher, files)
    tensors, told = load_file(files.tensors), json.loads(files.learned.read_bytes())
    trained = {n.removeprefix("trained/"): t for n, t in tensors.items() if n.startswith("trained/")}
    blocks = [NewBlock(*block) for block in told["blocks"]]
    return Learned(
        blocks, trained, tensors["probe"], tensors["seen"], told["fractions"], told["curve"], told["frozen"]
    )


def _follow(
    context: "StageContext", ranks: Ranks, files: RankFiles, launcher: "subprocess.Popen[bytes]"
) -> None:
    """Pass progress on until all ranks are done; StageFailed, or a rank's own error, when one is not."""
    passed, begun = b"", time.time()
    while True:
        files.follow()
        code = launcher.poll()
        passed = _pass_on(context, files, passed)
        beats = files.beats()
        if code == 0 and files.learned.exists():
            return
        if code is not None or files.errors() or _silent_dead(files, beats):
            raise _failure(context, ranks, files, launcher)
        latest = max((beat.at for beat in beats), default=begun)
        is_starting = len(beats) < ranks.processes or any(beat.what == START for beat in beats)
        patience = max(ranks.hang_seconds, START_SECONDS) if is_starting else ranks.hang_seconds
        if time.time() - latest > patience:
            raise StageFailed(_stopped(context, _hung(files, beats, ranks, patience)))
        time.sleep(LOOK_SECONDS)


def _failure(
    context: "StageContext", ranks: Ranks, files: RankFiles, launcher: "subprocess.Popen[bytes]"
) -> MansardError:
    """Who failed. One that died without a word comes first, then one that failed by itself: the others break off or are
    ended because of it, often before its end is seen, so everybody gets a moment."""
    end = time.monotonic() + END_SECONDS
    while time.monotonic() < end and launcher.poll() is None and not _silent_dead(files, files.beats()):
        time.sleep(LOOK_SECONDS)
    if dead := _silent_dead(files, files.beats()):
        return StageFailed(_stopped(context, f"rank {dead[0].rank} (process {dead[0].pid}) was killed"))
    for rank, error in files.errors().items():
        if error["victim"]:
            break
        return error_named(error["kind"], f"rank {rank}: {error['message']}", StageFailed)
    words = "; ".join(f"rank {rank}: {error['message']}" for rank, error in files.errors().items())
    status = f"the launcher {ranks.command(Path())[0]} ended with status {launcher.poll()}"
    return StageFailed(_stopped(context, f"{status}{'; ' if words else ''}{words}"))


def _silent_dead(files: RankFiles, beats: list[RankBeat]) -> list[RankBeat]:
    """Ranks on this host that are gone and said neither that they are done nor why they are not."""
    told = files.errors()
    return [b for b in beats if b.what != "done" and b.is_here and b.rank not in told and not _runs(b.pid)]


def _hung(files: RankFiles, beats: list[RankBeat], ranks: Ranks, seconds: float) -> str:
    """Which rank the others wait for: one whose process stands still, else the one that is behind them."""
    known = {beat.rank for beat in beats}
    missing = [rank for rank in range(ranks.processes) if rank not in known]
    if missing:
        return f"rank {missing[0]} did not start within {seconds:.0f} s"
    late = min(beats, key=lambda beat: (files.seconds_silent(beat.rank) < STILL_SECONDS, beat.count))
    who = f"rank {late.rank} (process {late.pid} on {late.host})"
    return f"{who} hangs in {late.what}: nothing for {seconds:.0f} s"


def _stopped(context: "StageContext", what: str) -> str:
    return f"training stopped: {what}; {kept(Checkpoints(context.work))}; the same command goes on from there"


def _pass_on(context: "StageContext", files: RankFiles, passed: bytes) -> bytes:
    """Rank 0's newest progress, where it is new."""
    try:
        raw = files.progress.read_bytes()
    except FileNotFoundError:
        return passed
    if raw != passed:
        context.channel.send({"progress": json.loads(raw)})
    return raw


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def _clear(launcher: "subprocess.Popen[bytes]", files: RankFiles) -> None:
    """No rank is left on this host."""
    if launcher.poll() is None:
        launcher.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(END_SECONDS)
        launcher.kill()
        launcher.wait()
    for beat in files.beats():
        if beat.is_here and _runs(beat.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(beat.pid, signal.SIGKILL)
