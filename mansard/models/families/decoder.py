"""Shapes that most families share: attention with grouped keys and values, a gated MLP, RMS norms, the outer tensors.

Defaults are those of the family's config class in transformers 5: an absent key means the same to both. Shapes are
[out, in] as in the checkpoint. Legend: H hidden, I intermediate, Q query width, K key (and value) width, D head width.
"""

from collections.abc import Sequence

from mansard.errors import BadInput
from mansard.models.families.family import Config, Shapes, count, depth_of

LAYER_KINDS = ("full_attention", "sliding_attention")


def head_width(config: Config, default: int | None = None) -> int:
    """D; without `default` and key the hidden width is split over the heads."""
    if config.get("head_dim", default) is not None:
        return count(config, "head_dim", default)
    hidden, heads = count(config, "hidden_size"), count(config, "num_attention_heads")
    if hidden % heads:
        raise BadInput(f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    return hidden // heads


def attention_widths(config: Config, head_dim: int | None = None, key_heads: int | None = None) -> tuple[int, int]:
    """(Q, K). `head_dim` and `key_heads` are the family's defaults."""
    heads, width = count(config, "num_attention_heads"), head_width(config, head_dim)
    if config.get("num_key_value_heads", key_heads) is None:
        return heads * width, heads * width
    grouped = count(config, "num_key_value_heads", key_heads)
    if heads % grouped:
        raise BadInput(
            f"config.json: num_attention_heads {heads} is no multiple of num_key_value_heads {grouped}; it must be"
        )
    return heads * width, grouped * width


def attention(config: Config, widths: tuple[int, int], biased: Sequence[str] = ()) -> Shapes:
    """q, k, v and o; `biased` are those with a bias."""
    hidden, (query, key) = count(config, "hidden_size"), widths
    weights = {
        "q_proj": (query, hidden), "k_proj": (key, hidden), "v_proj": (key, hidden), "o_proj": (hidden, query)
    }  # fmt: skip
    return _with_biases("self_attn", weights, biased)


def mlp(config: Config, biased: bool = False, width: int | None = None) -> Shapes:
    """gate, up and down."""
    hidden, inner = count(config, "hidden_size"), width or count(config, "intermediate_size")
    weights = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return _with_biases("mlp", weights, tuple(weights) if biased else ())


def norms(config: Config, *names: str) -> Shapes:
    """Norms over the hidden width."""
    return {f"{name}.weight": (count(config, "hidden_size"),) for name in names}


def head_norms(config: Config, width: int) -> Shapes:
    """Norms over a head's queries and keys."""
    return {"self_attn.q_norm.weight": (width,), "self_attn.k_norm.weight": (width,)}


def outer(config: Config) -> Shapes:
    """Embedding, last norm and head."""
    table = (count(config, "vocab_size"), count(config, "hidden_size"))
    return {"model.embed_tokens.weight": table, "model.norm.weight": table[1:], "lm_head.weight": table}


def layer_types(config: Config, pattern: Sequence[str]) -> list[str]:
    """One kind of attention per block: what config.json lists, else `pattern`, which the config class would infer from
    the blocks' indices. Once blocks are inserted the indices say something else, so the list must be written out."""
    found = config.get("layer_types")
    if found is None:
        return list(pattern)
    depth = depth_of(config)
    if not isinstance(found, list) or len(found) != depth or any(kind not in LAYER_KINDS for kind in found):
        raise BadInput(
            f"config.json: layer_types: {found!r:.80}; a list of {depth} values, one a block, each of "
            f"{', '.join(LAYER_KINDS)}, is expected"
        )
    return list(found)


def _with_biases(module: str, weights: Shapes, biased: Sequence[str]) -> Shapes:
    return {
        **{f"{module}.{name}.weight": shape for name, shape in weights.items()},
        **{f"{module}.{name}.bias": weights[name][:1] for name in biased},
    }
