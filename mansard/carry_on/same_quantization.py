"""Does a node keep its weights as the base does, and as the site says? States of 4-bit weights are not those of 16-bit
ones, so a branch trained on the wrong ones meets others in service.

Nodes with the plugin say it in /v1/models (told_cards.py). Stock vLLM does not: its dev endpoints would, by the name of
a kernel, and are not for engines that others reach; the config.json of the folder that it names may be on another
machine, and knows nothing of --quantization. Only the method is compared, not its bits: two nodes that differ in these
differ on the probe.
"""

from typing import Any

from mansard.carry_on.nodes import Node
from mansard.errors import BadInput

NOT_QUANTIZED = "none"


def quantization_of(config: dict[str, Any]) -> str:
    """The method that a config.json names, `none` where it names none."""
    return str((config.get("quantization_config") or {}).get("quant_method") or NOT_QUANTIZED).lower()


def check_quantization(node: Node, own: str) -> None:
    """BadInput where the node's quantization is not what the site says, or not the base's `own`; or where the site says
    one and the node none."""
    told = node.told_quantization()
    stated = node.quantization
    if told is None and stated is not None:
        raise BadInput(
            f"{node.endpoint} cannot say its quantization, the site says {stated}; install mansard-vllm "
            "(infra/vllm-plugin) where it runs, or leave quantization out of the node's entry"
        )
    if stated is not None and told != stated:
        raise BadInput(
            f"{node.endpoint} serves quantization {told}, the site says {stated}; start the node on the base's "
            "artifact, or mend nodes: in the site"
        )
    if told is not None and told != own:
        raise BadInput(
            f"{node.endpoint} serves quantization {told}, the base has {own}; start the node on the base's artifact"
        )
