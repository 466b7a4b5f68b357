"""Token windows from the lines of a JSONL text file ({"text", ...} each): always the same ones, in file order.

Texts are joined with the tokenizer's end-of-text token (where it has one) and cut into windows of equal length; nothing
is shuffled, padded or dropped in between. For calibration and probes; training packs its own sequences.
"""

import json
from collections.abc import Iterable

import torch
from transformers import PreTrainedTokenizerBase

from mansard.errors import BadInput
from mansard.models.vocabulary import end_of


def first_windows(
    tokenizer: PreTrainedTokenizerBase,
    lines: Iterable[bytes],
    windows: int,
    window_tokens: int,
    name: str,
    keys: str = "quantize.samples or quantize.sample_tokens",
) -> torch.Tensor:
    """The first `windows` windows, int64 [windows, window_tokens]; messages call the data `name`, and `keys` what asks
    for so much of it.

    Raises BadInput when the data is not UTF-8 JSONL with a "text" in each line, or holds too few tokens.
    """
    wanted = windows * window_tokens
    ids: list[int] = []
    end = end_of(tokenizer)
    for number, line in enumerate(lines, start=1):
        if len(ids) >= wanted:
            break
        if not line.strip():  # training steps over it too
            continue
        ids += tokenizer(_text(line, number, name), add_special_tokens=False, verbose=False)["input_ids"] + end
    if len(ids) < wanted:
        raise BadInput(
            f"{name}: {len(ids)} tokens, but {windows} windows of {window_tokens} tokens ({wanted}) are asked for; "
            f"give more text or lower {keys}"
        )
    return torch.tensor(ids[:wanted], dtype=torch.int64).reshape(windows, window_tokens)


def _text(line: bytes, number: int, name: str) -> str:
    try:
        text = json.loads(line)["text"]
    except UnicodeDecodeError as error:
        raise BadInput(f"{name}: line {number} is not UTF-8") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise BadInput(f'{name}: line {number} is not a JSON object with "text"') from error
    if not isinstance(text, str):
        raise BadInput(f'{name}: line {number}: "text" is {type(text).__name__}, a string is expected')
    return text
