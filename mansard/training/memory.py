"""What a process's training takes of its device: now, at most so far, and how much there is.

On an accelerator these are torch's allocations (tensors, without the fragments between them); on a CPU the process's
resident size, libraries included.
"""

import resource
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

HEADROOM = 0.95
"""The share of a device's free memory that training plans with: allocators leave fragments."""


def taken_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available_bytes(device: torch.device) -> int:
    """What this process may come to hold: what it holds, and HEADROOM of what is free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return taken_bytes(device) + int(HEADROOM * (free + unused))
    lines = Path("/proc/meminfo").read_text().splitlines()
    free_kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return taken_bytes(device) + int(HEADROOM * free_kib * 1024)


class Kept:
    """What the forward pass in its context keeps: on an accelerator all that it leaves allocated (its output too); on a
    CPU what autograd keeps for backward, counted once a storage, those of `known` tensors not."""

    def __init__(self, device: torch.device, known: Iterable[torch.Tensor]) -> None:
        self._device = device
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in known}
        # Hooks would change what a compiled block does.
        self._hooks = None if device.type == "cuda" else saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.size_bytes = 0

    def __enter__(self) -> "Kept":
        if self._hooks is None:
            self.size_bytes = -taken_bytes(self._device)
        else:
            self._hooks.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:  # noqa: ANN401 - a context manager's
        if self._hooks is None:
            self.size_bytes += taken_bytes(self._device)
        else:
            self._hooks.__exit__(*failure)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.size_bytes += storage.nbytes()
        return tensor
