"""Users of the router in threads of their own, who ask again and again until they are stopped."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Answer = TypeVar("Answer")


class Users(Generic[Answer]):
    """`ask(user, turn)` is one request of a user; `answers` are what it returned, as they ended."""

    def __init__(self, ask: Callable[[int, int], Answer], num_users: int, pause_seconds: float) -> None:
        self.answers: list[Answer] = []
        self._ask = ask
        self._pause_seconds = pause_seconds
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(user,)) for user in range(num_users)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _run(self, user: int) -> None:
        turn = 0
        while not self._stop.is_set():
            turn += 1
            self.answers.append(self._ask(user, turn))
            self._stop.wait(self._pause_seconds)
