"""Guard prompts to an engine that does not answer."""

import asyncio
import json
import socket
import time
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from mansard.errors import MansardError
from mansard.serving.host.fingerprint import Fingerprints

RECORDED = {"format": 1, "answers": [{"prompt": "p", "tokens": [], "logprobs": [], "alternatives": []}]}
ASKED = {"prompts": ["p"], "tokens": 4, "tolerance": 0.1}


class Evidence:
    """Journal and store, as far as a comparison asks them."""

    async def call(self, ask: Any, *_: object) -> Any:
        return ask(self)

    def registration(self, *_: object) -> Any:
        return SimpleNamespace(model_name="demo", fingerprint="f" * 64, stages=(("fingerprint", "r", "f" * 64),))

    def read_file(self, *_: object) -> bytes:
        return json.dumps(RECORDED).encode()

    def lineage(self, *_: object) -> list[dict[str, Any]]:
        return [{"recipe": "r", "spec": {"fingerprint": ASKED}}]


async def _ask_until_deadline(seconds: float) -> tuple[float, str, bytes]:
    """How long a comparison took, what it raised, and what the engine read after the request."""
    loop, evidence = asyncio.get_running_loop(), Evidence()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        engine: Any = SimpleNamespace(endpoint=f"http://127.0.0.1:{listener.getsockname()[1]}")
        async with aiohttp.ClientSession() as session:
            prints = Fingerprints(evidence, evidence, session, lambda *_: "demo")  # type: ignore[arg-type]
            begun = time.monotonic()
            asking = asyncio.create_task(prints.find_change("demo", 2, engine, seconds))
            connection, _ = await loop.sock_accept(listener)
            with connection:
                assert await loop.sock_recv(connection, 65536)
                with pytest.raises(MansardError) as raised:
                    await asking
                took = time.monotonic() - begun
                connection.settimeout(5)
                rest = b"".join(iter(lambda: connection.recv(65536), b""))
    return took, str(raised.value), rest


def test_an_engine_that_never_answers_a_guard_prompt_has_failed_at_the_deadline_and_is_let_off() -> None:
    took, said, _ = asyncio.run(_ask_until_deadline(0.5))
    assert took > 0.4
    assert "no answer within" in said
