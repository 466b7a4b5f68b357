"""A tokenizer against the vocabulary of its model: no text may become a number that the embedding does not have.

Reads tokenizer.json (the fast tokenizer's file). A special token beyond the vocabulary is let through: no plain text
becomes one (Gemma-3's text models carry an image token so). Older forms of tokenizers are not looked at.
"""

from typing import Any

from mansard.errors import BadInput
from mansard.models.families import Config
from mansard.models.families.family import count
from mansard.store.snapshot import read_json_object

TOKENIZER_FILE = "tokenizer.json"


def check_vocabulary(config: Config, tokenizer: bytes) -> None:
    """BadInput names the first token whose number the model does not have."""
    size = count(config, "vocab_size")
    beyond = {number: token for token, number in _numbers(tokenizer) if number >= size}
    if beyond:
        number = min(beyond)
        more = f" (and {len(beyond) - 1} more)" if len(beyond) > 1 else ""
        raise BadInput(
            f"{TOKENIZER_FILE}: token {beyond[number]!r:.60}{more} has the number {number}, but config.json's "
            f"vocab_size is {size}; the tokenizer that belongs to the model must stand beside its weights"
        )


def _numbers(tokenizer: bytes) -> list[tuple[str, int]]:
    """(token, number) of everything that plain text can become."""
    tree = read_json_object(tokenizer, TOKENIZER_FILE)
    try:
        added = tree.get("added_tokens") or []
        special = {token["content"] for token in added if token.get("special")}
        numbers = [*_model_numbers(tree.get("model") or {}), *((str(t["content"]), int(t["id"])) for t in added)]
        return [(token, number) for token, number in numbers if token not in special]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{TOKENIZER_FILE}: not a tokenizer's file ({error!r:.80}); save the tokenizer again") from error


def _model_numbers(model: dict[str, Any]) -> list[tuple[str, int]]:
    vocabulary = model.get("vocab") or {}
    if isinstance(vocabulary, dict):
        return [(str(token), int(number)) for token, number in vocabulary.items()]
    return [(str(pair[0]), number) for number, pair in enumerate(vocabulary)]  # unigram: [token, score] in order


def end_of(tokenizer: Any) -> list[int]:  # noqa: ANN401 - a transformers tokenizer
    """What follows every document: EOS, where the tokenizer has one."""
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
