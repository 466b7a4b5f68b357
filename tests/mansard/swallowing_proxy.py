"""A network between a client and a server that can begin to swallow: it accepts, and nothing comes out at either."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path


class SwallowingProxy:
    """TCP on `port` in front of a server's Unix socket. What was swallowed once stays so; a new connection may pass."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._sockets: list[socket.socket] = []
        self._is_swallowing = False
        self._generation = 0
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def url_of(self, url: str, folder: Path) -> str:
        """The URL of a database behind the socket in `folder`, through here."""
        name, _, query = url.partition("?")
        kept_query = "&".join(part for part in query.split("&") if not part.startswith("host="))
        return f"{name.replace('@/', f'@127.0.0.1:{self.port}/')}?{kept_query}"

    def swallow(self) -> None:
        self._is_swallowing = True
        self._generation += 1

    def pass_on(self) -> None:
        """What connects from now on."""
        self._is_swallowing = False

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the end
            while True:
                client = self._listener.accept()[0]
                self._sockets.append(client)
                if self._is_swallowing:
                    continue
                server = socket.socket(socket.AF_UNIX)
                server.connect(str(self._target))
                self._sockets.append(server)
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=self._pump, args=(*ends, self._generation), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, generation: int) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if generation != self._generation:
                    return
                sink.sendall(data)
            if generation == self._generation:
                sink.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def swallowing_proxy(target: Path) -> Iterator[SwallowingProxy]:
    proxy = SwallowingProxy(target)
    try:
        yield proxy
    finally:
        proxy.close()
