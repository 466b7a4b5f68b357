"""Model families: what the surgery must know of an architecture, one file each. Any other is refused by name.

Supported: Llama, Mistral, Qwen2, Qwen3, Gemma-2, Gemma-3 (text), Phi-3, Mixtral, Qwen3-MoE.
"""

from mansard.errors import BadInput
from mansard.models.families.family import Config, Family, Slot, depth_of
from mansard.models.families.gemma2 import GEMMA2
from mansard.models.families.gemma3 import GEMMA3
from mansard.models.families.llama import LLAMA
from mansard.models.families.mistral import MISTRAL
from mansard.models.families.mixtral import MIXTRAL
from mansard.models.families.phi3 import PHI3
from mansard.models.families.qwen2 import QWEN2
from mansard.models.families.qwen3 import QWEN3
from mansard.models.families.qwen3_moe import QWEN3_MOE

__all__ = ["FAMILIES", "LLAMA", "Config", "Family", "Slot", "depth_of", "family_of"]

FAMILIES = {
    family.model_type: family
    for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, MIXTRAL, QWEN3_MOE)
}

def family_of(config: Config) -> Family:
    """The family of a config.json; BadInput names what is supported, or the entry that cannot be expanded or served.

    Keys that nobody knows are for `check_config_keys`, once, where a base comes in.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None or config.get("architectures") != [family.architecture]:
        known = ", ".join(f"{f.model_type} ({f.architecture})" for f in FAMILIES.values())
        raise BadInput(
            f"config.json: model_type {config.get('model_type')!r} with architectures "
            f"{config.get('architectures')!r} cannot be expanded; supported: {known}"
        )
    if config.get("quantization_config") is not None:
        raise BadInput("config.json: quantization_config: the model is quantized; name the unquantized one as base")
    family.check_config(config)
    return family
