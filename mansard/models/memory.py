"""What memory a model takes to load, and what there is: enough to choose a form of proof before anything is loaded."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from mansard.store.safetensors_header import TensorEntry

SHARE_BESIDE_WEIGHTS = 0.25
"""Of the weights' bytes: an allowance for activations, logits and what the loader holds at once."""

ROOT = Path("/")


def loading_bytes(tensors: Iterable[TensorEntry], bytes_per_number: int) -> int:
    """Bytes that one model of these tensors takes where each number has so many bytes."""
    numbers = sum(math.prod(entry.shape) for entry in tensors)
    return round(numbers * bytes_per_number * (1 + SHARE_BESIDE_WEIGHTS))


def available_bytes(root: Path = ROOT) -> int:
    """What this process may still take: the machine's free and reclaimable memory, or less where a control group
    (version 2, a container's limit) allows less."""
    machine = _table(root / "proc/meminfo")["MemAvailable:"] * 1024
    group = root / "sys/fs/cgroup"
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text()) - _table(group / "memory.stat")["inactive_file"]
    except (OSError, KeyError):  # no limit here, or a machine with the older control groups
        return machine
    return machine if limit == "max" else min(machine, max(int(limit) - used, 0))


def _table(path: Path) -> Mapping[str, int]:
    """NAME NUMBER lines."""
    return {words[0]: int(words[1]) for words in map(str.split, path.read_text().splitlines()) if len(words) >= 2}
