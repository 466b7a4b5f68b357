"""Several nodes work on a list of requests at once; answers come out in the list's order, each once.

At most `prefetch` answers for each node wait to be taken. A request that fails on a node goes to another one; a node
that fails `MAX_FAILURES` times running is left alone. Nothing is lost or repeated: a request is either waiting, at one
node, or answered.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch

from mansard.carry_on.nodes import NodeFailed
from mansard.carry_on.sequences import TokenSequence
from mansard.errors import StageFailed

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
MAX_FAILURES = 3
REQUESTS_PER_NODE = 4
"""Some are computed while the states of others travel. On an H100, a 7B shape, 4,096 tokens a request (2026-11-26): 2
give 30.0 thousand tokens/s, 4 give 42.2, 8 give 42.9; plain prefill does 46.0."""


class Gives(Protocol[T_co]):
    """A node, or what stands for one, and what it makes of a request."""

    @property
    def endpoint(self) -> str: ...

    def states(self, sequences: Sequence[TokenSequence]) -> T_co: ...


GivesStates = Gives[list[torch.Tensor]]


@dataclass(slots=True)
class _Board(Generic[T]):
    """What the threads share; everything under `changed`."""

    waiting: list[int]
    prefetch: int
    changed: threading.Condition = field(default_factory=threading.Condition)
    answers: dict[int, T] = field(default_factory=dict)
    under_way: set[int] = field(default_factory=set)
    failed_at: dict[int, set[str]] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    bug: BaseException | None = None
    taken: int = 0
    is_closed: bool = False

    def alive(self) -> set[str]:
        return {endpoint for endpoint, count in self.failures.items() if count < MAX_FAILURES}

    def has_news(self, number: int) -> bool:
        """Whether the one who waits for this request may go on: it is answered, or never will be."""
        if number in self.answers or self.bug is not None:
            return True
        return not self.alive() and number not in self.under_way

    def next_for(self, endpoint: str) -> int | None:
        """The first waiting request in the window that this node may try: not one that it failed while others live."""
        for number in self.waiting:
            if number >= self.taken + self.prefetch:
                return None
            if endpoint not in self.failed_at.get(number, set()) or self.alive() <= self.failed_at[number]:
                return number
        return None


def fetch(
    nodes: Sequence[Gives[T]], requests: Sequence[Sequence[TokenSequence]], prefetch: int
) -> Iterator[T]:
    """What the nodes made of each request, in order. StageFailed when no node is left."""
    failures = {node.endpoint: 0 for node in nodes}
    board: _Board[T] = _Board(list(range(len(requests))), prefetch * len(nodes), failures=failures)
    threads = [
        threading.Thread(target=_work, args=(board, node, requests), daemon=True, name=f"states from {node.endpoint}")
        for node in nodes
        for _ in range(REQUESTS_PER_NODE)
    ]
    for thread in threads:
        thread.start()
    try:
        for number in range(len(requests)):
            with board.changed:
                board.changed.wait_for(lambda: board.has_news(board.taken))
                if board.bug is not None:
                    raise board.bug
                if number not in board.answers:
                    raise StageFailed(f"no inference node is left: {'; '.join(board.problems[-3:])}")
                found = board.answers.pop(number)
                board.taken = number + 1
                board.changed.notify_all()
            yield found
    finally:
        with board.changed:
            board.is_closed = True
            board.changed.notify_all()


def _work(board: _Board[T], node: Gives[T], requests: Sequence[Sequence[TokenSequence]]) -> None:
    while True:
        with board.changed:
            board.changed.wait_for(lambda: _may_go(board, node))
            if board.is_closed or _is_out(board, node):
                return
            number = board.next_for(node.endpoint)
            assert number is not None, "waited for"
            board.waiting.remove(number)
            board.under_way.add(number)
        try:
            found = node.states(requests[number])
        except NodeFailed as error:
            with board.changed:
                board.under_way.discard(number)
                board.failures[node.endpoint] += 1
                board.failed_at.setdefault(number, set()).add(node.endpoint)
                board.problems.append(str(error))
                board.waiting.insert(0, number)
                board.waiting.sort()
                board.changed.notify_all()
            continue
        except BaseException as error:  # noqa: BLE001 - handed to the thread that asked, which raises it
            with board.changed:
                board.bug = error
                board.changed.notify_all()
            return
        with board.changed:
            board.under_way.discard(number)
            board.failures[node.endpoint] = 0
            board.answers[number] = found
            board.changed.notify_all()


def _may_go(board: _Board[T], node: Gives[T]) -> bool:
    return board.is_closed or _is_out(board, node) or board.next_for(node.endpoint) is not None


def _is_out(board: _Board[T], node: Gives[T]) -> bool:
    return board.failures[node.endpoint] >= MAX_FAILURES
