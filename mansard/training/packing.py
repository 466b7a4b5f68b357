"""Packed sequences without attention across documents.

A row of T tokens holds segments: pieces of documents, one after the other. Positions start at 0 in every segment, the
mask is causal inside a segment and empty between them, and the last token of a segment predicts nothing. A document
that reaches the end of a row goes on in the next one. Every segment starts with the tokenizer's BOS, where it has one,
because every prompt that is served does. Shapes: R rows, B rows of a batch, T tokens of a row.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy
import torch
from numpy.typing import NDArray

from mansard.errors import BadInput

IGNORED = -100
"""The label of a token that predicts nothing (torch's cross-entropy skips it)."""

CHUNK_TOKENS = 1 << 20

Rows = NDArray[numpy.int32]
Ids = NDArray[numpy.integer[Any]]


def pack(documents: Iterable[Sequence[int] | Ids], row_tokens: int, bos: int | None) -> tuple[Rows, Rows]:
    """(tokens_RT, positions_RT) of the documents in order; what does not fill a last row is dropped."""
    return _whole(packed_rows(documents, row_tokens, bos), row_tokens)


def first_rows(
    documents: Iterable[Sequence[int] | Ids], row_tokens: int, bos: int | None, limit: int
) -> tuple[Rows, Rows]:
    """The first `limit` of these rows (fewer where there are no more); later documents are not asked for."""
    parts, count = [], 0
    for tokens_RT, positions_RT in packed_rows(documents, row_tokens, bos):
        parts.append((tokens_RT[: limit - count], positions_RT[: limit - count]))
        count += len(parts[-1][0])
        if count == limit:
            break
    return _whole(parts, row_tokens)


def _whole(chunks: Iterable[tuple[Rows, Rows]], row_tokens: int) -> tuple[Rows, Rows]:
    parts = [(numpy.empty((0, row_tokens), numpy.int32),) * 2, *chunks]
    return numpy.concatenate([tokens for tokens, _ in parts]), numpy.concatenate([places for _, places in parts])


def packed_rows(
    documents: Iterable[Sequence[int] | Ids], row_tokens: int, bos: int | None
) -> Iterator[tuple[Rows, Rows]]:
    """The same rows in order, about CHUNK_TOKENS tokens at a time. BadInput for rows that hold nothing but BOS."""
    start = [] if bos is None else [bos]
    begin = len(start)
    if row_tokens <= begin:
        raise BadInput(f"data.sequence_tokens is {row_tokens}: a row needs room for BOS and a token; 2 at the least")
    size = max(1, CHUNK_TOKENS // row_tokens) * row_tokens
    tokens, positions, filled = numpy.empty(size, numpy.int32), numpy.empty(size, numpy.int32), 0
    count = numpy.arange(row_tokens, dtype=numpy.int32)
    for document in documents:
        taken = 0
        while taken < len(document):
            segment = min(begin + len(document) - taken, row_tokens - filled % row_tokens)
            tokens[filled : filled + begin] = start
            tokens[filled + begin : filled + segment] = document[taken : taken + segment - begin]
            positions[filled : filled + segment] = count[:segment]
            taken += segment - begin
            filled += segment
            if filled == size:
                yield tokens.reshape(-1, row_tokens), positions.reshape(-1, row_tokens)
                tokens, positions, filled = numpy.empty_like(tokens), numpy.empty_like(positions), 0
    whole = filled - filled % row_tokens
    if whole:
        yield tokens[:whole].reshape(-1, row_tokens), positions[:whole].reshape(-1, row_tokens)


def labels_of(tokens_BT: torch.Tensor, positions_BT: torch.Tensor) -> torch.Tensor:
    """The next token of the same segment, IGNORED at every segment's end."""
    labels_BT = torch.full_like(tokens_BT, IGNORED)
    follows = positions_BT[:, 1:] != 0
    labels_BT[:, :-1][follows] = tokens_BT[:, 1:][follows]
    return labels_BT


def masks_of(
    config: Any,  # noqa: ANN401 - a transformers config
    positions_BT: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor | dict[str, torch.Tensor]:
    """What the model takes as attention mask: one mask, or one for each kind of layer where it lists kinds."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return mask_of(positions_BT, dtype, window)
    masks = {"full_attention": mask_of(positions_BT, dtype)}
    if "sliding_attention" in kinds:
        masks["sliding_attention"] = mask_of(positions_BT, dtype, window)
    return masks


def mask_of(positions_BT: torch.Tensor, dtype: torch.dtype, window: int | None = None) -> torch.Tensor:
    """[B, 1, T, T], added to the attention scores: 0 inside a segment's past (the last `window` tokens of it, the
    present one included), minus infinity elsewhere."""
    segments_BT = (positions_BT == 0).cumsum(-1)
    length = positions_BT.shape[1]
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=positions_BT.device).tril()
    if window is not None:
        causal_TT = causal_TT.triu(1 - window)
    allowed_BTT = (segments_BT[:, :, None] == segments_BT[:, None, :]) & causal_TT
    zeros = torch.zeros(allowed_BTT.shape, dtype=dtype, device=positions_BT.device)
    return zeros.masked_fill_(~allowed_BTT, float("-inf"))[:, None]


def check_fits(config: Any, row_tokens: int, highest_token: int) -> None:  # noqa: ANN401 - a transformers config
    """BadInput where rows are longer than the model's context, or the tokenizer knows more tokens than the model."""
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and longest < row_tokens:
        raise BadInput(
            f"data.sequence_tokens {row_tokens} is longer than the model's max_position_embeddings of {longest}"
        )
    if highest_token >= config.vocab_size:
        raise BadInput(
            f"the tokenizer gives token {highest_token}, the model's vocabulary has {config.vocab_size}; "
            "the tokenizer that belongs to the model must stand beside its weights"
        )
