"""Model families: what the surgery must know of an architecture, one entry each.

A family names the tensors of a checkpoint exactly, so a new block never takes or trains a tensor by a lucky substring.
Supported: Llama. Every other architecture is refused by name.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mansard.errors import BadInput

Config = Mapping[str, Any]
"""config.json, parsed."""


@dataclass(frozen=True, slots=True)
class Family:
    """How the tensors of one architecture are called. Names of a block's tensors are relative to the block.

    `optional_*` may stand in a checkpoint or not. `zeroed` are the last factors before each residual sum: with zeros
    there a block adds nothing. `per_block_lists` are entries of config.json with one value per block.
    """

    model_type: str
    architecture: str
    block_prefix: str
    block_tensors: Callable[[Config], tuple[str, ...]]
    optional_block_tensors: tuple[str, ...]
    outer_tensors: Callable[[Config], tuple[str, ...]]
    optional_outer_tensors: Callable[[Config], tuple[str, ...]]
    zeroed: Callable[[Config], tuple[str, ...]]
    per_block_lists: tuple[str, ...]

    def block_tensor(self, block: int, name: str) -> str:
        """The checkpoint's name of a block's tensor."""
        return f"{self.block_prefix}{block}.{name}"

    def split(self, tensor: str) -> tuple[int, str] | None:
        """(block, name in the block) of a checkpoint's tensor; None for tensors outside blocks."""
        block, dot, name = tensor.removeprefix(self.block_prefix).partition(".")
        if not tensor.startswith(self.block_prefix) or not dot or not (block.isascii() and block.isdigit()):
            return None
        return (int(block), name) if str(int(block)) == block else None


_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def _llama_block_tensors(config: Config) -> tuple[str, ...]:
    weights = [f"{n}.weight" for n in (*_ATTENTION, *_MLP, "input_layernorm", "post_attention_layernorm")]
    biases = [f"{n}.bias" for n in (_ATTENTION if _flag(config, "attention_bias") else ())]
    biases += [f"{n}.bias" for n in (_MLP if _flag(config, "mlp_bias") else ())]
    return (*weights, *biases)


def _llama_outer_tensors(config: Config) -> tuple[str, ...]:
    head = () if _flag(config, "tie_word_embeddings") else ("lm_head.weight",)
    return ("model.embed_tokens.weight", "model.norm.weight", *head)


def _llama_zeroed(config: Config) -> tuple[str, ...]:
    names = {f"{n}.{kind}" for n in ("self_attn.o_proj", "mlp.down_proj") for kind in ("weight", "bias")}
    return tuple(n for n in _llama_block_tensors(config) if n in names)


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    block_prefix="model.layers.",
    block_tensors=_llama_block_tensors,
    # A constant that early conversions saved (Llama 2 has it); transformers and vLLM skip it.
    optional_block_tensors=("self_attn.rotary_emb.inv_freq",),
    outer_tensors=_llama_outer_tensors,
    optional_outer_tensors=lambda config: ("lm_head.weight",) if _flag(config, "tie_word_embeddings") else (),
    zeroed=_llama_zeroed,
    per_block_lists=("layer_types", "mlp_layer_types", "no_rope_layers"),
)

FAMILIES = {family.model_type: family for family in (LLAMA,)}

_INDEXED_BY_BLOCK = ("pruned_heads",)
"""Entries that map a block's index to something."""

_NOT_PER_BLOCK = ("architectures", "token_id", "token_ids", "words_ids", "suppress_tokens", "forced_decoder_ids")
"""Ends of the names of lists that have nothing to do with blocks, however long they are."""


def family_of(config: Config) -> Family:
    """The family of a config.json; BadInput names what is supported."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None or config.get("architectures") != [family.architecture]:
        known = ", ".join(f"{f.model_type} ({f.architecture})" for f in FAMILIES.values())
        raise BadInput(
            f"config.json: model_type {config.get('model_type')!r} with architectures "
            f"{config.get('architectures')!r} cannot be expanded; supported: {known}"
        )
    if config.get("quantization_config") is not None:
        raise BadInput("config.json: quantization_config: the model is quantized; name the unquantized one as base")
    return family


def depth_of(config: Config) -> int:
    """Number of blocks."""
    depth = config.get("num_hidden_layers")
    if type(depth) is not int or depth < 1:
        raise BadInput(f"config.json: num_hidden_layers: {depth!r}; a number from 1 up is expected")
    return depth


def check_tensor_names(family: Family, config: Config, names: Collection[str]) -> None:
    """BadInput unless a checkpoint has the tensors that its config asks for, and no others."""
    wanted, allowed = set(family.outer_tensors(config)), set(family.optional_outer_tensors(config))
    for block in range(depth_of(config)):
        wanted |= {family.block_tensor(block, n) for n in family.block_tensors(config)}
        allowed |= {family.block_tensor(block, n) for n in family.optional_block_tensors}
    found = set(names)
    if wanted - found:
        raise BadInput(_some(wanted - found, "missing from the checkpoint, though config.json asks for it"))
    if found - wanted - allowed:
        raise BadInput(
            _some(found - wanted - allowed, f"not a tensor of a {family.model_type} model of this config.json")
        )


def rebuilt_config(family: Family, config: Config, sources: Sequence[int]) -> dict[str, Any]:
    """The config of the model whose block i is a copy of block `sources[i]`: depth and every per-block entry.

    BadInput where an entry might hold one value per block and the family does not know it.
    """
    depth = depth_of(config)
    rebuilt = {**config, "num_hidden_layers": len(sources)}
    for name, value in config.items():
        if value is None:
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
            raise BadInput(
                f"config.json: {name}: a list of {depth} values in a model of {depth} blocks, and {family.model_type} "
                f"has no such entry: say what it is by removing it; known: {', '.join(family.per_block_lists)}"
            )
    return rebuilt


def _flag(config: Config, name: str) -> bool:
    value = config.get(name, False)
    if type(value) is not bool:
        raise BadInput(f"config.json: {name}: {value!r}; true or false is expected")
    return value


def _some(names: Collection[str], what: str) -> str:
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"tensor {min(names)!r}{more} is {what}"
