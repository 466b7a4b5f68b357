"""Which blocks of a model an expansion copies. Pure; what a block is worth was measured before (stage `importance`)."""

import json
import math
from collections.abc import Sequence

from mansard.errors import BadInput
from mansard.specs.surgery import Expand

IMPORTANCE_FILE = "importance.json"


def copied_blocks(expand: Expand, depth: int, gains: Sequence[float] | None = None) -> set[int]:
    """The 0-based blocks of a model of `depth` blocks that get a copy; BadInput for what the model does not have.

    `even`: copy j of k (from 1) of a model of n blocks stands after block ceil(j n / k) - 1 (0-based), the end of the
    j-th of k groups whose sizes differ by one at most; the last copy is the last block. For k that divides n these are
    the positions of LLaMA Pro (arXiv 2401.02415). `upper-half`: the same among the blocks from floor(n / 2) on, so that
    training computes gradients through half of the model at most. `importance`: the k blocks with the least of `gains`
    (what the loss of general text gains without each block: ADEPT, arXiv 2510.10071), of equal ones the lower.
    """
    if isinstance(expand.positions, list):
        return _listed(expand, expand.positions, depth)
    begin = depth // 2 if expand.positions == "upper-half" else 0
    if expand.blocks > depth - begin:
        where = f"1 to {depth - begin} can be {expand.positions}"
        raise BadInput(f"expand.blocks: {expand.blocks} in a model of {depth} blocks; {where}")
    if expand.positions == "importance":
        return set(_least(gains, depth)[: expand.blocks])
    blocks = depth - begin
    return {begin - (-j * blocks // expand.blocks) - 1 for j in range(1, expand.blocks + 1)}


def read_gains(data: bytes) -> list[float]:
    """The gains of an importance.json, block by block; BadInput where it is not one."""
    try:
        gains = json.loads(data)["gains"]
        return [float(gain) for gain in gains]
    except (ValueError, KeyError, TypeError) as error:
        expected = "what stage importance made is expected"
        raise BadInput(f"{IMPORTANCE_FILE}: no gains in it ({error!r:.80}); {expected}") from error


def _listed(expand: Expand, positions: list[int], depth: int) -> set[int]:
    copied = set(positions)
    if len(copied) != expand.blocks or len(positions) != expand.blocks:
        raise BadInput(f"expand.positions: {positions}; {expand.blocks} different blocks are expected")
    outside = sorted(p for p in copied if not 0 <= p < depth)
    if outside:
        raise BadInput(f"expand.positions: {outside[0]} in a model of {depth} blocks; 0 to {depth - 1} are its blocks")
    return copied


def _least(gains: Sequence[float] | None, depth: int) -> list[int]:
    """The blocks, the least important first."""
    if gains is None:
        raise BadInput("expand.positions: importance, but no importance was measured; stage importance makes it")
    if len(gains) != depth or not all(math.isfinite(gain) for gain in gains):
        raise BadInput(f"{IMPORTANCE_FILE}: {len(gains)} gains, a finite number for each of {depth} blocks is expected")
    return sorted(range(depth), key=lambda block: (gains[block], block))
