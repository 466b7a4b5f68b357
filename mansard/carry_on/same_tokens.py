"""Does a node cut text into the base's tokens? One that does not serves another model, whatever it is called.

Asked over HTTP (`/tokenize`, which vLLM has in every mode); a node that has no such path is taken as it is.
"""

from collections.abc import Sequence
from typing import Any

from mansard.errors import BadInput, MansardError
from mansard.evaluation.engine_api import post_json


def check_tokens(endpoint: str, served_name: str, tokenizer: Any, seen: Sequence[int]) -> None:  # noqa: ANN401
    """BadInput where the node's tokens of what `seen` says are not those of `tokenizer`, a transformers one."""
    text = tokenizer.decode(seen, skip_special_tokens=True)
    wanted = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    try:
        body = {"model": served_name, "prompt": text, "add_special_tokens": False}
        found = post_json(endpoint, "/tokenize", body).get("tokens")
    except MansardError:  # no such path
        return
    if found != wanted:
        raise BadInput(
            f"{endpoint} has another tokenizer than the base: {text[:30]!a} ... is {_told(found)} to it, "
            f"{_told(wanted)} to the base; name nodes of the base"
        )


def _told(tokens: Any) -> str:  # noqa: ANN401 - what a node answered
    if not isinstance(tokens, list):
        return f"{tokens!r:.40}"
    return f"{len(tokens)} tokens that begin with {tokens[:3]}"
