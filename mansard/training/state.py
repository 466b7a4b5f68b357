"""Checkpoints: trained tensors, optimizer, cursor and random generators. Never the base.

One safetensors file, replaced atomically: after `kill -9` the last complete checkpoint is there. The tensors are copied
to memory at once, and a thread writes that copy while training goes on; at most one is being written. A run that
resumes from one ends bit-identical to one that was never killed (on a CPU). A checkpoint names its run (the work
folder's name, which is the recipe), so one of another base, spec or data is refused.
"""

import json
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mansard.canonical import canonical_json
from mansard.errors import BadInput


@dataclass(slots=True)
class Cursor:
    """Where the run stands. `nats` and `labels` are sums since the last point of the curve."""

    step: int = 0
    nats: float = 0.0
    labels: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)


class Checkpoints:
    """The newest checkpoint of one run, in the stage's work folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "checkpoint.safetensors"
        self._run = folder.name
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._written: Future[None] | None = None
        self._copies: dict[str, torch.Tensor] = {}

    def write(self, cursor: Cursor, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy now, write later; waits for the checkpoint before this one, and raises what stopped that."""
        self.wait()
        metadata = {"cursor": canonical_json({"format": 1, "run": self._run, **asdict(cursor)}).decode()}
        copied = self._copy(tensors)
        self._written = self._thread.submit(self._write, dict(self._copies), metadata, copied)

    def wait(self) -> None:
        """Until the last checkpoint is on the disk; OSError where it could not be written."""
        if self._written is not None:
            written, self._written = self._written, None
            written.result()

    def read(self) -> tuple[Cursor, dict[str, torch.Tensor]] | None:
        """The newest checkpoint, or None where there is none; BadInput for a damaged one, or another run's."""
        self.wait()
        if not self.path.exists():
            return None
        try:
            with safe_open(str(self.path), framework="pt") as file:
                value = json.loads(file.metadata()["cursor"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise BadInput(f"{self.path}: damaged ({error!s:.200}); remove it to train from the start") from error
        if value.pop("format") != 1 or value.pop("run", None) != self._run:
            raise BadInput(
                f"{self.path}: a checkpoint of another base, spec or data than this run's; "
                "remove it to train from the start"
            )
        return Cursor(**value), tensors

    def _copy(self, tensors: Mapping[str, torch.Tensor]) -> torch.cuda.Event | None:
        """Into memory that is kept from one checkpoint to the next, pinned for an accelerator's; an event says when."""
        self._copies = {name: kept for name, kept in self._copies.items() if name in tensors}
        on_accelerator = False
        for name, tensor in tensors.items():
            if name not in self._copies:
                self._copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._copies[name].copy_(tensor.detach(), non_blocking=True)
            on_accelerator |= tensor.is_cuda
        if not on_accelerator:
            return None
        copied = torch.cuda.Event()
        copied.record()
        return copied

    def _write(
        self, tensors: dict[str, torch.Tensor], metadata: dict[str, str], copied: torch.cuda.Event | None
    ) -> None:
        """Write beside, fsync, rename, fsync the folder. A killed writer's file is overwritten by the next."""
        if copied is not None:
            copied.synchronize()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f".{self.path.name}.new")
        save_file(tensors, beside, metadata=metadata)
        _sync(beside)
        beside.replace(self.path)
        _sync(self.path.parent)


def random_states() -> dict[str, torch.Tensor]:
    """The generators' states, as a checkpoint holds them: rng/cpu, and rng/cuda where there is one."""
    states = {"rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["rng/cuda"] = torch.cuda.get_rng_state()
    return states


def take_random_states(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Set the generators as a checkpoint says; returns its other tensors."""
    torch.set_rng_state(tensors["rng/cpu"])
    if "rng/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng/cuda"])
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("rng/")}


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
