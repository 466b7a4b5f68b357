"""Checkpoints: trained tensors, optimizer, cursor and random generators. Never the base.

One safetensors file, replaced atomically: after `kill -9` the last complete checkpoint is there. A run that resumes
from it ends bit-identical to one that was never killed.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from mansard.canonical import canonical_json, write_atomically


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

    def write(self, cursor: Cursor, tensors: Mapping[str, torch.Tensor]) -> None:
        metadata = {"cursor": canonical_json({"format": 1, **asdict(cursor)}).decode()}
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_atomically(self.path, save(plain, metadata=metadata))

    def read(self) -> tuple[Cursor, dict[str, torch.Tensor]] | None:
        """The newest checkpoint, or None where there is none."""
        if not self.path.exists():
            return None
        with safe_open(str(self.path), framework="pt") as file:
            value = json.loads(file.metadata()["cursor"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        assert value.pop("format") == 1, "a work folder belongs to one recipe, so the format is this code's"
        return Cursor(**value), tensors
