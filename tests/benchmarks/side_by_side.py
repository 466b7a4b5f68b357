"""Independent trainings of a benchmark, several at a time in processes of their own, each kept by its name as it ends.

One small model leaves a GPU mostly idle, so that several take little longer than one. A training is a function of what
it stands on (a ground, which every process loads for itself from the work folder) and of plain arguments; what it
answers is JSON. With one job all runs in this process, in the order in which results are asked for; the results are the
same. What is kept is not run again. A training that fails ends the program, as does a deadline (code 3); those that are
under way then are finished and kept. Seconds are only measured `alone`, when nothing else runs.
"""

import gc
import json
import math
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from mansard.canonical import write_atomically
from mansard.digest import digest_bytes

GROUND, RUNS = "ground.pt", "runs.json"
OUT_OF_TIME = 3
Found = dict[str, Any]
Item, Result = TypeVar("Item"), TypeVar("Result")


class OutOfTime(SystemExit):
    """The deadline has passed: no training is begun."""

    def __init__(self) -> None:
        super().__init__(OUT_OF_TIME)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, each in a process of its own")
    parser.add_argument("--work", type=Path, help="where what is done is kept, so that a run goes on")
    parser.add_argument("--deadline", type=float, default=math.inf, metavar="SECONDS",
                        help="no training begins later than this; ends with code 3 if any is left")  # fmt: skip


@contextmanager
def work_folder(work: Path | None, *what: object) -> Iterator[Path]:
    """A folder of its own for what is measured, in `work` or until the end."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = (work or Path(temporary)) / digest_bytes(repr(what).encode())[:12]
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def stand_on(folder: Path, make: Callable[[], Any]) -> None:
    """The ground is in the folder: made now if it is not. What was found on another one counts no more."""
    if (folder / GROUND).exists():
        return
    (folder / RUNS).unlink(missing_ok=True)
    beside = folder / f".{GROUND}.{os.getpid()}"
    torch.save(make(), beside)
    beside.replace(folder / GROUND)
    _free()


@lru_cache(maxsize=1)
def _ground(load: Callable[[Any], Any], folder: Path) -> Any:
    """Once a process; `load` makes a ground of what was kept."""
    return load(torch.load(folder / GROUND, map_location="cpu", weights_only=False))


class Trainings:
    """What was run on a ground, by name; as a context, so that the processes end. `least`: how many there will be."""

    def __init__(
        self, folder: Path, load: Callable[[Any], Any], jobs: int = 1, deadline: float = math.inf, least: int = 0
    ) -> None:
        """`deadline`: by time.monotonic()."""
        self._place = (load, folder)
        self._jobs, self._deadline, self._least = jobs, deadline, least
        self._file = folder / RUNS
        self.runs: Found = json.loads(self._file.read_text()) if self._file.exists() else {}
        self._lock = threading.RLock()
        self._begun: dict[str, Future[Found]] = {}
        self._has_failed = False
        self._took: list[float] = []
        self._slots: ThreadPoolExecutor | None = None
        self._processes: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Trainings":
        if self._jobs > 1:
            threads = max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // self._jobs))
            spawn = multiprocessing.get_context("spawn")
            self._slots = ThreadPoolExecutor(self._jobs)
            self._processes = ProcessPoolExecutor(self._jobs, spawn, _settle, (threads,))
        _tell(f"{len(self.runs)} runs are kept, {self._jobs} at a time are made; at least {self._least} in all")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._close()
        if kind is OutOfTime:
            left = max(self._least - len(self.runs), 1)
            _tell(f"out of time: {len(self.runs)} runs are kept, at least {left} are left; the same command with the "
                  f"same --work goes on")  # fmt: skip

    def ahead(self, *calls: tuple[Any, ...]) -> None:
        """These, (name, function, arguments...), will be asked for: they begin where there is room."""
        with self._lock:
            for name, run, *arguments in calls:
                if self._slots is not None and name not in self.runs and name not in self._begun:
                    self._begun[name] = self._slots.submit(self._one, name, run, *arguments)

    def of(self, name: str, run: Callable[..., Found], *arguments: Any) -> Found:
        """What `run(ground, *arguments)` found, once it has."""
        self.ahead((name, run, *arguments))
        if name in self._begun:
            return self._begun[name].result()
        return self._one(name, run, *arguments)

    def alone(self, name: str, run: Callable[..., Found], *arguments: Any) -> Found:
        """The same, in this process, after all others have ended: for what measures seconds."""
        self._close()
        return self._one(name, run, *arguments)

    def each(self, ask: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """`ask(item)` of every item, each in a thread where trainings run side by side. Failures come before what only
        ran out of time."""
        asked = list(items)
        if self._slots is None:
            return [ask(item) for item in asked]
        with ThreadPoolExecutor(max(len(asked), 1)) as threads:
            futures = [threads.submit(ask, item) for item in asked]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, OutOfTime)):
            raise error
        return [future.result() for future in futures]

    def _one(self, name: str, run: Callable[..., Found], *arguments: Any) -> Found:
        if name not in self.runs:
            if self._has_failed or time.monotonic() > self._deadline:
                raise OutOfTime
            began = time.monotonic()
            try:
                found = self._made(run, arguments)
            except BaseException as error:
                self._has_failed = True
                _tell(f"{name}: failed: {error!r}; no further one is begun, what is under way is finished and kept")
                raise
            self._keep(name, found, time.monotonic() - began)
        kept: Found = self.runs[name]
        return kept

    def _made(self, run: Callable[..., Found], arguments: tuple[Any, ...]) -> Found:
        if self._processes is None:
            return _run(self._place, run, arguments)
        return self._processes.submit(_run, self._place, run, arguments).result()

    def _keep(self, name: str, found: Found, seconds: float) -> None:
        with self._lock:
            self.runs[name] = json.loads(json.dumps(found))  # as it will be read again
            write_atomically(self._file, json.dumps(self.runs).encode())
            self._took.append(seconds)
            left = max(self._least - len(self.runs), 0)
            rest = left * sum(self._took) / len(self._took) / self._jobs
            _tell(f"{name}: {seconds:.0f} s; {len(self.runs)} done, at least {left} left, about {rest:.0f} s")

    def _close(self) -> None:
        """What is under way is finished; what waits for room finds that it is too late."""
        for pool in (self._slots, self._processes):
            if pool is not None:
                pool.shutdown(cancel_futures=True)
        self._slots = self._processes = None


def _run(place: tuple[Callable[[Any], Any], Path], run: Callable[..., Found], arguments: tuple[Any, ...]) -> Found:
    ground = _ground(*place)
    _free()
    return run(ground, *arguments)


def _settle(threads: int) -> None:
    """A process that shares the machine's cores."""
    torch.set_num_threads(threads)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(threads)


def _free() -> None:
    """Memory of models that are gone goes back to the device, for the processes beside this one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
