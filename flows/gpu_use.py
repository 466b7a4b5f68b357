"""How busy the GPU is while a block runs, and what of it fell to each stage. Nothing where there is no nvidia-smi."""

import contextlib
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

EVERY_MS = 250


@dataclass(frozen=True, slots=True)
class Sample:
    """Of all GPUs at a time: the highest utilization in percent, the sum of memory in GiB."""

    at: float
    percent: float
    gib: float


@dataclass(slots=True)
class GpuUse:
    """The samples so far, oldest first."""

    samples: list[Sample] = field(default_factory=list)

    def between(self, begin: float, end: float) -> dict[str, float]:
        """Mean percent, share of samples at 0, and the most GiB; empty without samples."""
        inside = [s for s in self.samples if begin <= s.at < end]
        if not inside:
            return {}
        return {
            "gpu_mean_percent": round(sum(s.percent for s in inside) / len(inside), 1),
            "gpu_idle_share": round(sum(s.percent == 0 for s in inside) / len(inside), 3),
            "gpu_gib": round(max(s.gib for s in inside), 2),
        }


@contextlib.contextmanager
def gpu_use() -> Iterator[GpuUse]:
    """Samples that a thread reads from nvidia-smi until the block ends."""
    use = GpuUse()
    query = ["--query-gpu=index,utilization.gpu,memory.used", "--format=csv,noheader,nounits", "-lms", str(EVERY_MS)]
    try:
        process = subprocess.Popen(
            ["nvidia-smi", *query], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError:
        yield use
        return
    reader = threading.Thread(target=_read, args=(process, use), daemon=True)
    reader.start()
    try:
        yield use
    finally:
        process.terminate()
        process.wait(timeout=30)
        reader.join(timeout=30)
        if process.stdout is not None:
            process.stdout.close()


def _read(process: "subprocess.Popen[str]", use: GpuUse) -> None:
    """A round of lines, one a GPU, is one sample; it begins with the lowest index."""
    assert process.stdout is not None
    rows: list[Sequence[float]] = []
    for line in process.stdout:
        try:
            index, percent, mib = (float(cell) for cell in line.split(","))
        except ValueError:  # a card that does not say ([N/A])
            continue
        if rows and index <= rows[-1][0]:
            use.samples.append(_sample(rows))
            rows = []
        rows.append((index, percent, mib))


def _sample(rows: Sequence[Sequence[float]]) -> Sample:
    return Sample(time.time(), max(row[1] for row in rows), sum(row[2] for row in rows) / 1024)


def stage_rows(
    command: str, begin: float, end: float, stages: Sequence[dict[str, Any]], use: GpuUse
) -> list[dict[str, Any]]:
    """One command as rows, in order of time: its stages ({"name", "begin", "seconds"}), what lies before and after them
    (engine starts, imports, servers), and the whole."""
    rows = []
    at = begin
    for stage in sorted(stages, key=lambda s: float(s["begin"])):
        stop = stage["begin"] + stage["seconds"]
        if stage["begin"] - at >= 1:
            rows.append(_row(f"{command}: before {stage['name']}", at, stage["begin"], use))
        rows.append(_row(f"{command}: {stage['name']}", stage["begin"], stop, use))
        at = max(at, stop)
    if rows and end - at >= 1:
        rows.append(_row(f"{command}: after the last stage", at, end, use))
    return [*rows, _row(command, begin, end, use)]


def _row(name: str, begin: float, end: float, use: GpuUse) -> dict[str, Any]:
    return {"name": name, "seconds": round(end - begin, 1), **use.between(begin, end)}
