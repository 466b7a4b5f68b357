"""The feed gives the mixture's batches, in order, and ends."""

import numpy
import pytest
import torch

from mansard.training.data import Mixture, Packed
from mansard.training.feed import feed


def mixture() -> Mixture:
    tokens = numpy.arange(40, dtype=numpy.int32).reshape(10, 4)
    positions = numpy.tile(numpy.arange(4, dtype=numpy.int32), (10, 1))
    return Mixture([Packed("a", tokens, positions, 3.0)], [1.0], 2, 0)


@pytest.mark.parametrize(("first", "end"), [(0, 12), (5, 7), (3, 3)])
def test_batches_are_those_of_their_steps(first: int, end: int) -> None:
    reference = mixture()
    found = list(feed(mixture(), first, end, is_pinned=False))
    assert len(found) == end - first
    for step, batch in enumerate(found, start=first):
        assert torch.equal(batch.tokens_BT, reference.batch(step).tokens_BT)
        assert torch.equal(batch.labels_BT, reference.batch(step).labels_BT)


def test_a_mixture_that_fails_is_not_silent() -> None:
    with pytest.raises(ValueError, match="empty"):
        list(feed(Mixture([], [], 2, 0), 0, 4, is_pinned=False))
