"""Ports for servers that a test starts later.

The system gives port 0 and every outgoing connection from one range; a port that was free a second ago may then be
somebody's connection, and the server does not come up. These are below that range, drawn so that tests which run beside
each other seldom meet, with room above each for the engines that a host starts from it.
"""

import random
import socket

RANGE = range(10_240, 32_000, 16)


def free_ports(count: int) -> list[int]:
    """So many different ones that nobody listens on now."""
    ports: list[int] = []
    drawing = random.SystemRandom()
    while len(ports) < count:
        port = drawing.choice(RANGE)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in ports:
            ports.append(port)
    return ports


def free_port() -> int:
    return free_ports(1)[0]
