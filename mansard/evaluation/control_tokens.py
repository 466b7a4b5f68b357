"""Items that hold the control tokens of some other tokenizer: its turns and ends would be read as plain text.

Known by their form (`<|im_start|>`, `<start_of_turn>`, `[INST]`, and `<s>` or `</s>` at an end of a text), so that a
suite made from a chat template for another model is refused before anything is evaluated on it. The tokenizer's own
control tokens are welcome. Not covered: control tokens of other forms, and built-in tasks, whose items are not ours.
"""

import json
import re
from collections.abc import Collection, Iterator, Sequence

from mansard.errors import BadInput
from mansard.evaluation.suites import Item

_FORMS = re.compile(
    r"<\|[A-Za-z0-9_]{2,40}\|>|<\uff5c[^<>|]{1,40}\uff5c>|<(?:start|end)_of_turn>|\[/?INST\]|\A\s*<s>|</s>\s*\Z"
)


def known_tokens(tokenizer: bytes) -> frozenset[str]:
    """The tokens that a tokenizer.json adds to its vocabulary, control tokens among them."""
    added = json.loads(tokenizer).get("added_tokens") or []
    return frozenset(str(token["content"]) for token in added)


def check_control_tokens(suite: str, items: Sequence[Item], known: Collection[str]) -> None:
    """BadInput names the first item with a control token that is not among `known`."""
    for item in items:
        for text in _texts(item):
            for found in _FORMS.finditer(text):
                token = found[0].strip()
                if token not in known:
                    raise BadInput(
                        f"suite {suite}: item {item['id']!r:.60} holds {token!r}, a control token that this model's "
                        "tokenizer does not have; write the items without another model's chat template"
                    )


def _texts(item: Item) -> Iterator[str]:
    for key in ("text", "context"):
        if key in item:
            yield item[key]
    yield from item.get("choices", ())
