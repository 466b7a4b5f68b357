"""vLLM middleware (`--middleware=mansard_peer.SameUser`): an engine answers the user that it runs as, and no browser.

What a Unix socket of mode 600 would promise, on a loopback port: for every HTTP and WebSocket request, on every path,
the kernel is asked whose socket is at the other end (NETLINK_SOCK_DIAG, 20-50 us, 2026-12). A socket that its owner has
closed has no user any more and is refused too. A request with an Origin or Sec-Fetch-Site header comes from a page and
is refused, because a foreign page in the operator's browser is the right user. Guarantees: what cannot be told is
refused. Not covered: root. Standard library only: it lies on the engine's PYTHONPATH.
"""

import os
import socket
import struct
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST = 1
ALL_STATES = 0xFFFFFFFF
NO_COOKIE = b"\xff" * 8
HEADER = struct.Struct("=IHHII")
UID_AND_INODE = struct.Struct("=II")
UID_OFFSET = HEADER.size + 4 + 48 + 12
"""struct inet_diag_msg (linux/inet_diag.h): family, state, timer, retransmits; the sockets' id; expires, two queues."""
ANSWER_SECONDS = 1.0
FROM_A_PAGE = (b"origin", b"sec-fetch-site")
BODY = b'{"error":{"message":"this engine answers the user that runs it","type":"authentication_error","code":401}}'


def peer_uid(client: tuple[str, int], server: tuple[str, int]) -> int | None:
    """The user of the IPv4 socket `client` that is connected to `server`, both on this machine; None: not known."""
    try:
        ends = struct.pack("!HH", client[1], server[1])
        addresses = [socket.inet_aton(host).ljust(16, b"\0") for host in (client[0], server[0])]
        request = struct.pack("=BBBBI", socket.AF_INET, socket.IPPROTO_TCP, 0, 0, ALL_STATES)
        request += ends + b"".join(addresses) + struct.pack("=I", 0) + NO_COOKIE
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as kernel:
            kernel.settimeout(ANSWER_SECONDS)
            size = HEADER.size + len(request)
            kernel.sendto(HEADER.pack(size, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, 1, 0) + request, (0, 0))
            answer = kernel.recv(8192)
        if HEADER.unpack_from(answer)[1] != SOCK_DIAG_BY_FAMILY:
            return None
        uid, inode = UID_AND_INODE.unpack_from(answer, UID_OFFSET)
    except (OSError, struct.error):
        return None
    return int(uid) if inode else None


def is_allowed(client: object, server: object, header_names: set[bytes]) -> bool:
    """Whether a request may be answered; addresses as ASGI has them."""
    if not (isinstance(client, list | tuple) and isinstance(server, list | tuple)):
        return False
    if header_names.intersection(FROM_A_PAGE):
        return False
    return peer_uid((client[0], client[1]), (server[0], server[1])) == os.getuid()


class SameUser:
    """The ASGI application around vLLM's."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or is_allowed(
            scope.get("client"), scope.get("server"), {bytes(name).lower() for name, _ in scope["headers"]}
        ):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": BODY})
