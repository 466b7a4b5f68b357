"""From nodes to shards on disk: coded in the threads that fetch, written by a thread behind.

Held at once, whatever the capture's length: for each node `PREFETCH` coded requests and `REQUESTS_PER_NODE` that are on
their way in bf16 (as an answer's body and as its states), the shard that grows, and the one that is written, twice. At
width 5,120 in fp8 that is 0.5 GB a node and 1.0 GB of shards, in bf16 0.7 and 2.0.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mansard.carry_on.fetching import GivesStates, fetch
from mansard.carry_on.nodes import NodeFailed
from mansard.carry_on.sequences import TokenSequence, groups
from mansard.carry_on.shards import Shard, write_shard
from mansard.carry_on.wire import Coded, Scheme, encode
from mansard.errors import BadInput

REQUEST_TOKENS = 4096
REQUEST_SEQUENCES = 32
"""The node describes each sequence in one header line, which HTTP bounds."""
PREFETCH = 8
"""Answers that may wait, for each node."""


@dataclass(frozen=True, slots=True)
class CodingNode:
    """A node whose states are coded by the thread that asked for them; torch lets the others run meanwhile."""

    node: GivesStates
    scheme: Scheme
    states_per_token: int

    @property
    def endpoint(self) -> str:
        return self.node.endpoint

    def states(self, sequences: Sequence[TokenSequence]) -> list[Coded]:
        """NodeFailed, too, where a state is not finite: another node's may be."""
        try:
            return [encode(s, [0], self.scheme, self.states_per_token) for s in self.node.states(sequences)]
        except BadInput as error:
            raise NodeFailed(f"{self.endpoint}: {error}") from error


def fill(
    nodes: Sequence[GivesStates], folder: Path, shards: Sequence[Shard], scheme: Scheme, states_per_token: int = 1
) -> Iterator[Shard]:
    """Each shard, in order, once it is on disk. StageFailed when no node is left; what is on disk then stays whole."""
    requests = groups([s for shard in shards for s in shard.sequences], REQUEST_TOKENS, REQUEST_SEQUENCES)
    coded = _one_by_one(fetch([CodingNode(n, scheme, states_per_token) for n in nodes], requests, PREFETCH))
    behind: Future[Shard] | None = None
    with ThreadPoolExecutor(1, "shard writer") as writer:
        for shard in shards:
            parts = [next(coded) for _ in shard.sequences]
            if behind is not None:
                yield behind.result()
            behind = writer.submit(_written, folder, shard, parts, scheme)
        if behind is not None:
            yield behind.result()


def _written(folder: Path, shard: Shard, parts: list[Coded], scheme: Scheme) -> Shard:
    write_shard(folder, shard, parts, scheme)
    return shard


def _one_by_one(answers: Iterator[list[Coded]]) -> Iterator[Coded]:
    for answer in answers:
        yield from answer
