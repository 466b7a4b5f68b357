"""config.json of a model whose blocks were copied, moved or taken away: depth and every per-block entry follow."""

from collections.abc import Sequence
from typing import Any

from mansard.errors import BadInput
from mansard.models.families import Config, Family, depth_of

_INDEXED_BY_BLOCK = ("pruned_heads",)
"""Entries that map a block's index to something."""

_NOT_PER_BLOCK = ("architectures", "token_id", "token_ids", "words_ids", "suppress_tokens", "forced_decoder_ids")
"""Ends of the names of lists that have nothing to do with blocks, however long they are."""


def rebuilt_config(family: Family, config: Config, sources: Sequence[int]) -> dict[str, Any]:
    """The config of the model whose block i is a copy of block `sources[i]`.

    BadInput where an entry might hold one value per block and the family does not know it.
    """
    depth = depth_of(config)
    special = family.rebuilt_entries(config, sources)
    rebuilt = {**config, "num_hidden_layers": len(sources)}
    for name, value in config.items():
        if value is None or name in special:
            continue
        if name in family.per_block_lists:
            if not isinstance(value, list) or len(value) != depth:
                raise BadInput(
                    f"config.json: {name}: {value!r:.80}; a list of {depth} values, one a block, is expected"
                )
            rebuilt[name] = [value[source] for source in sources]
        elif name in _INDEXED_BY_BLOCK:
            if not isinstance(value, dict):
                raise BadInput(f"config.json: {name}: {value!r:.80}; a mapping of block indices is expected")
            rebuilt[name] = {str(i): value[str(s)] for i, s in enumerate(sources) if str(s) in value}
        elif isinstance(value, list) and len(value) == depth and not name.endswith(_NOT_PER_BLOCK):
            known = ", ".join(family.per_block_lists) or "none"
            raise BadInput(
                f"config.json: {name}: a list of {depth} values in a model of {depth} blocks, and {family.model_type} "
                f"has no such entry: say what it is by removing it; known: {known}"
            )
    return {**rebuilt, **special}
