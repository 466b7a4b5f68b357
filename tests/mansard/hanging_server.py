"""A server that accepts and never answers, for as long as a context lasts."""

import contextlib
import socket
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def hanging_server() -> Iterator[str]:
    """Its URL."""
    accepted = []

    def accept() -> None:
        with contextlib.suppress(OSError):  # the end
            while True:
                accepted.append(listener.accept()[0])

    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in accepted:
                connection.close()
