"""From nodes to shards on disk: coded in the threads that fetch, written by a thread behind.

Held at once, whatever the capture's length: for each node `PREFETCH` coded requests and `REQUESTS_PER_NODE` that are on
their way in bf16 (as an answer's body and as its states), and a shard that waits for the disk (half of the one that
is written, half of the next). At width 5,120 in fp8 that is 0.5 GB a node and 0.3 GB of shards, in bf16 0.7 and 0.7.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Semaphore

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
    before: tuple[Shard, Future[None]] | None = None
    with ThreadPoolExecutor(1, "shard writer") as thread:
        for shard in shards:
            behind = _Behind(max(len(shard.sequences) // 2, 1))
            writing = thread.submit(write_shard, folder, shard, behind, scheme)
            with behind:
                for _ in shard.sequences:
                    behind.put(next(coded), writing)
            if before is not None:
                before[1].result()
                yield before[0]
            before = shard, writing
        if before is not None:
            before[1].result()
            yield before[0]


class _Behind:
    """A shard's sequences on their way to the thread that writes, `room` of them at most. Where taking them fails, so
    does the writing."""

    def __init__(self, room: int) -> None:
        self._room = Semaphore(room)
        self._held: SimpleQueue[Coded | BaseException | None] = SimpleQueue()

    def put(self, part: Coded, writing: Future[None]) -> None:
        """Raises what `writing` ended with where it does not take any more."""
        while not self._room.acquire(timeout=1):
            if writing.done():
                writing.result()
        self._held.put(part)

    def __iter__(self) -> Iterator[Coded]:
        while (part := self._held.get()) is not None:
            if isinstance(part, BaseException):
                raise part
            self._room.release()
            yield part

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._held.put(error)


def _one_by_one(answers: Iterator[list[Coded]]) -> Iterator[Coded]:
    for answer in answers:
        yield from answer
