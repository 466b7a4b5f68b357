"""A branch that does not belong on this server is the caller's mistake: 400 with our line from /v1/load_lora_adapter.

vLLM makes 500 of whatever the engine raises there, whatever its type: between engine and API server only the text
travels, wrapped in others' words. So the engine's side marks its line, and the API server's finds it again.
"""

import re
import sys
from http import HTTPStatus
from typing import Any

_MARKED = re.compile(r"<branch refused>(.*)</branch refused>", re.DOTALL)


def marked(error: ValueError) -> ValueError:
    """To be raised in the engine."""
    return ValueError(f"<branch refused>{error}</branch refused>")


def line_in(message: str) -> str | None:
    """What was marked; None where the message is not of a refused branch."""
    found = _MARKED.search(message)
    return None if found is None else found[1]


def answer_refusals() -> None:
    """In processes that answer over HTTP, once."""
    if "vllm.entrypoints.openai" not in sys.modules:
        return
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    plain = OpenAIServingModels.load_lora_adapter
    if getattr(plain, "answers_refusals", False):
        return

    async def load_lora_adapter(self: Any, *arguments: Any, **named: Any) -> Any:  # noqa: ANN401 - vLLM's own types
        answer = await plain(self, *arguments, **named)
        line = None if isinstance(answer, str) else line_in(answer.error.message)
        if line is not None:
            error = answer.error
            error.message, error.type, error.code = line, "BadRequestError", HTTPStatus.BAD_REQUEST.value
            error.param = "lora_path"
        return answer

    load_lora_adapter.answers_refusals = True  # type: ignore[attr-defined]
    OpenAIServingModels.load_lora_adapter = load_lora_adapter
