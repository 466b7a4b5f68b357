"""What a step reads from host memory, copied to the device while the piece before it is in use.

Copies run on a stream of their own into two sets of memory by turns; events keep a piece whole for as long as it is
used. On a CPU nothing is copied ahead: every piece is made when it is asked for.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")
There = TypeVar("There")


class DoubleBuffer:
    """Of one device and one kind of piece."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._rooms: dict[tuple[str, int, torch.dtype], list[torch.Tensor]] = {}
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._copied = [torch.cuda.Event(), torch.cuda.Event()]
            self._used = [torch.cuda.Event(), torch.cuda.Event()]

    def through(self, items: Sequence[Item], put: Callable[[Item, int], There]) -> Iterator[There]:
        """What `put(item, turn)` gives, item by item; valid until the next is asked for.

        On a GPU `put` runs on the copying stream, an item ahead and after what the stream of the caller was asked for
        so far (states may be computed there); what it gives must lie in `room` of its turn."""
        if self.device.type != "cuda":
            yield from (put(item, 0) for item in items)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        coming = self._put(items[0], 0, put)
        for number in range(len(items)):
            turn, there = number % 2, coming
            if number + 1 < len(items):
                coming = self._put(items[number + 1], 1 - turn, put)
            torch.cuda.current_stream().wait_event(self._copied[turn])
            yield there
            self._used[turn].record()

    def room(self, name: str, turn: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory of that shape, the same at every call with this turn; it grows to the largest shape of its name."""
        values = torch.Size(shape).numel()
        rooms = self._rooms.setdefault((name, turn, dtype), [])
        if not rooms or rooms[-1].numel() < values:
            # The smaller one stays alive: recorded work may read it.
            rooms.append(torch.empty(values, dtype=dtype, device=self.device))
        return rooms[-1][:values].view(*shape)

    def _put(self, item: Item, turn: int, put: Callable[[Item, int], There]) -> There:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._used[turn])
            there = put(item, turn)
            self._copied[turn].record(self._stream)
        return there
