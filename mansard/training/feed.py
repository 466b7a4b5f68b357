"""Batches made ahead by a thread, in pinned memory where an accelerator takes them: the device never waits for data."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from mansard.training.data import Batch, Mixture

AHEAD = 3
"""Batches in hand. One is made in well under a millisecond; three bridge a pause of the thread."""


def feed(mixture: Mixture, first: int, end: int, is_pinned: bool) -> Iterator[Batch]:
    """The batches of steps `first` to `end`, in order; only the feed may ask `mixture` while it lasts."""
    with ThreadPoolExecutor(1, "feed") as thread:
        made = deque(thread.submit(_made, mixture, step, is_pinned) for step in range(first, min(first + AHEAD, end)))
        for step in range(first, end):
            batch = made.popleft().result()
            if step + AHEAD < end:
                made.append(thread.submit(_made, mixture, step + AHEAD, is_pinned))
            yield batch


def _made(mixture: Mixture, step: int, is_pinned: bool) -> Batch:
    batch = mixture.batch(step)
    if not is_pinned:
        return batch
    return batch.each(lambda tensor: tensor.pin_memory())
