"""Work on fixed tensors, recorded as a CUDA graph and played again: a step of a branch is thousands of small kernels.

The first time a piece of work is asked for it is done as it is written (libraries set themselves up), the second time
it is recorded, and played from then on. Guarantees: whatever a piece reads and writes lies in tensors that its caller
names, so one that moved is recorded anew; all recordings share one pool of memory, because none leaves anything in it.
Without recording, and on a CPU, every piece is simply done. Not covered: what draws random numbers.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch


class Replay:
    """Of one device. Everything that it does happens on a stream of its own, which `stream` enters."""

    def __init__(self, device: torch.device, is_recording: bool) -> None:
        self._on_gpu = is_recording and device.type == "cuda"
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        if self._on_gpu:
            self._stream = torch.cuda.Stream(device)
            self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Before it, what was asked of the device so far; after it, what was asked inside."""
        if not self._on_gpu:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            torch.cuda.current_stream().wait_stream(self._stream)

    def run(self, name: str, act: Callable[[], None], *tensors: torch.Tensor) -> None:
        """`act`, which reads and writes `tensors` and what is always in one place (weights and their gradients)."""
        if not self._on_gpu:
            act()
            return
        key = (name, tuple((tensor.data_ptr(), tuple(tensor.shape)) for tensor in tensors))
        if key not in self._graphs:
            self._graphs[key] = None
            act()
            return
        graph = self._graphs[key]
        if graph is None:
            graph = self._graphs[key] = self._recorded(act)
        graph.replay()

    def _recorded(self, act: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # It first waits, and gives back what the first time took. Other threads go on pinning memory meanwhile, which a
        # recording for all threads would forbid.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            act()
        return graph


@cache
def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """One kernel of it on a GPU; the function itself on a CPU, where a compiler may be missing."""
    return torch.compile(function, dynamic=False) if device.type == "cuda" else function
