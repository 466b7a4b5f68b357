"""Two processes train as one does: the same losses, checkpoints that either takes up, a named rank when one fails."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

import mansard
from mansard.errors import BadInput, StageFailed
from mansard.records import SnapshotId
from mansard.specs.training import Train
from mansard.store.store import Store
from mansard.training import stage
from mansard.training.rank_files import RankFiles
from mansard.training.ranks import check_ranks
from mansard.training.state import Checkpoints
from mansard.worker import Channel, StageContext

pytestmark = pytest.mark.slow

Fill = Callable[[Store], dict[str, SnapshotId]]
ROOT = Path(mansard.__file__).resolve().parent.parent
ROW_TOKENS, BATCH_ROWS = 32, 4
TORCHRUN = 2
"""The ZeRO level whose ranks torchrun starts, as sites that name no launcher have it; the others are forked."""


def spec(steps: int, **train: Any) -> dict[str, Any]:
    sources = [
        {"name": n, "train": f"{n}.train", "held_out": f"{n}.held-out", "weight": 0.5, "is_domain": n == "code"}
        for n in ("code", "prose")
    ]
    return {
        "data": {"sources": sources, "sequence_tokens": ROW_TOKENS, "min_domain_fraction": 0.3, "seed": 0},
        "train": {
            "tokens": steps * ROW_TOKENS * BATCH_ROWS, "batch_sequences": BATCH_ROWS, "precision": "fp32",
            "learning_rates": {"new_blocks": 1e-2, "base": 0.0}, "evaluate_every_steps": 2,
            "checkpoint_every_steps": 2, **train,
        },
    }  # fmt: skip


def ranks(
    level: int, processes: int = 2, hang_seconds: float = 600.0, launcher: Sequence[str] = ()
) -> dict[str, Any]:
    config = json.loads((ROOT / f"configs/deepspeed/zero{level}.json").read_text())
    asked = {"processes": processes, "config": config, "hang_seconds": hang_seconds, "launcher": tuple(launcher)}
    return {"ranks": asked}


def context(
    store: Store, inputs: dict[str, SnapshotId], asked: dict[str, Any], where: dict[str, Any], recipe: str
) -> StageContext:
    return StageContext(store, recipe, inputs, asked, where, store.work(recipe), Channel(StringIO()))


def curve(store: Store, made: SnapshotId) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(store.read_file(made, "training.json"))["curve"]
    return found


def assert_same_curve(store: Store, one: SnapshotId, other: SnapshotId) -> None:
    for a, b in zip(curve(store, one), curve(store, other), strict=True):
        for source, bits in a["bits_per_byte"].items():
            assert b["bits_per_byte"][source] == pytest.approx(bits, abs=1e-4), (a, b)
        if "loss" in a:
            assert b["loss"] == pytest.approx(a["loss"], abs=1e-4), (a, b)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return Store(tmp_path / "store")


@pytest.mark.parametrize("level", [1, 2, 3])
def test_two_ranks_learn_what_one_process_learns(
    level: int, store: Store, fill: Fill, forked_ranks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))  # reaches the ranks of torchrun
    anchor = {"anchor": {"kind": "kl", "weight": 1.0}} if level == 2 else {}
    inputs, asked = fill(store), spec(6, **anchor)
    alone = stage.run(context(store, inputs, asked, {}, "a" * 64))
    launcher = () if level == TORCHRUN else forked_ranks
    together = stage.run(context(store, inputs, asked, ranks(level, launcher=launcher), "b" * 64))
    assert_same_curve(store, alone, together)
    told = [json.loads(store.read_file(made, "training.json")) for made in (alone, together)]
    assert told[0]["frozen"] == told[1]["frozen"]
    ours, theirs = (load(store.read_file(made, "trained.safetensors")) for made in (alone, together))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, atol=1e-3, rtol=1e-3, msg=name)
    assert not (tmp_path / "extensions").exists(), "a rank compiled an extension of DeepSpeed"


def stopped_at(ctx: StageContext, step: int, act: Callable[[], None]) -> threading.Thread:
    """Runs `act` once a checkpoint of `step` or later is there."""

    def watch() -> None:
        while True:
            found = Checkpoints(ctx.work).read()
            if found is not None and found[0].step >= step:
                act()
                return
            time.sleep(0.02)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def rank_pid(ctx: StageContext, rank: int) -> int:
    return next(beat.pid for beat in RankFiles(ctx.work).beats() if beat.rank == rank)


@pytest.mark.parametrize(("level", "resumed_with"), [(2, 1), (3, 2)])
def test_a_killed_rank_is_named_and_the_run_goes_on(
    level: int, resumed_with: int, store: Store, fill: Fill, forked_ranks: list[str]
) -> None:
    inputs, asked = fill(store), spec(24)
    whole = stage.run(context(store, inputs, asked, {}, "a" * 64))
    launcher = () if level == TORCHRUN else forked_ranks
    ctx = context(store, inputs, asked, ranks(level, launcher=launcher), "b" * 64)
    pids: list[int] = []

    def kill() -> None:
        pids.extend(beat.pid for beat in RankFiles(ctx.work).beats())
        os.kill(rank_pid(ctx, 1), signal.SIGKILL)

    thread = stopped_at(ctx, 4, kill)
    with pytest.raises(StageFailed, match=r"rank 1 \(process \d+\) was killed; the checkpoint of step \d+ is kept"):
        stage.run(ctx)
    thread.join()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids), "no rank is left"
    where = {} if resumed_with == 1 else ranks(level, resumed_with, launcher=launcher)
    assert_same_curve(store, whole, stage.run(context(store, inputs, asked, where, "b" * 64)))


def test_a_rank_on_another_host_goes_on_while_the_stage_is_there(tmp_path: Path) -> None:
    """Another host: a name of its own, and no process of the stage's number."""
    words = ["unshare", "--pid", "--uts", "--fork", "--mount-proc"]
    if not shutil.which("unshare") or subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make namespaces")
    files = RankFiles(tmp_path)
    files.clear()
    code = (
        "import pathlib, sys, time; from mansard import rank; from mansard.training.rank_files import RankFiles\n"
        "rank.LOOK_SECONDS, rank.ALONE_SECONDS = 0.05, float(sys.argv[4])\n"
        "files = RankFiles(pathlib.Path(sys.argv[1])); rank._end_with(sys.argv[2], int(sys.argv[3]), files, 1)\n"
        "time.sleep(1.0 if rank.ALONE_SECONDS > 1 else 60.0); print('went on')"
    )
    told = [sys.executable, "-c", code, str(tmp_path), socket.gethostname(), str(os.getpid())]
    for alone, status in (("180", 0), ("0.2", 1)):
        inside = [*words, "sh", "-c", 'hostname elsewhere; exec "$@"', "sh", *told, alone]
        done = subprocess.run(inside, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert done.returncode == status, done.stderr
        assert ("went on" in done.stdout) == (status == 0)


def test_fp8_under_zero_3_is_refused() -> None:
    asked = Train.model_validate(spec(4, precision="bf16", frozen="fp8")["train"])
    with pytest.raises(BadInput, match=r"train\.frozen: fp8 needs ZeRO 1 or 2"):
        check_ranks(asked, ranks(3)["ranks"]["config"], 2)


def test_a_rank_that_hangs_is_named(store: Store, fill: Fill, forked_ranks: list[str]) -> None:
    ctx = context(store, fill(store), spec(400), ranks(2, hang_seconds=20.0, launcher=forked_ranks), "b" * 64)
    stopped_at(ctx, 4, lambda: os.kill(rank_pid(ctx, 1), signal.SIGSTOP))
    with pytest.raises(StageFailed, match=r"rank 1 \(process \d+ on .*\) hangs in \w+: nothing for 20 s"):
        stage.run(ctx)


@pytest.mark.parametrize(
    ("level", "processes", "train", "message"),
    [
        (2, 3, {}, r"train.batch_sequences 4 is no multiple of the site's training.processes 3"),
        (2, 2, {"optimizer": "adamw_8bit"}, r"^optimizer: adamw_8bit with master: fp32 runs in one process"),
    ],
)
def test_what_ranks_cannot_do_is_refused(
    level: int, processes: int, train: dict[str, Any], message: str, store: Store, fill: Fill
) -> None:
    with pytest.raises(BadInput, match=message):
        stage.run(context(store, fill(store), spec(4, **train), ranks(level, processes), "c" * 64))
