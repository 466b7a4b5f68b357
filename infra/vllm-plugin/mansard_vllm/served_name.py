"""ASGI middleware (`--middleware`): the router's header says which branch a request is for, whatever its body names.

Users name a model; which version of it answers is the router's choice, and the router rewrites no bodies. Requests
without the header pass untouched.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

HEADER = b"x-mansard-served-name"
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]


class ServedName:
    """Puts the header's name into the body's `model`."""

    def __init__(self, app: Application) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        name = next((v for n, v in scope.get("headers", ()) if n == HEADER), None)
        if scope["type"] != "http" or name is None:
            await self.app(scope, receive, send)
            return
        body = renamed(await _whole(receive), name.decode("latin-1"))
        kept = [(n, v) for n, v in scope["headers"] if n not in (HEADER, b"content-length")]
        scope = {**scope, "headers": [*kept, (b"content-length", b"%d" % len(body))]}
        is_given = False

        async def receive_whole() -> Message:
            nonlocal is_given
            if is_given:
                return await receive()  # the client's disconnect
            is_given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, receive_whole, send)


def renamed(body: bytes, name: str) -> bytes:
    """The body with `model` set; one that is no JSON object goes on as it is, for vLLM to refuse."""
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError):
        return body
    return json.dumps({**tree, "model": name}).encode() if isinstance(tree, dict) else body


async def _whole(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)
