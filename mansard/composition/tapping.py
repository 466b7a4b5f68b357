"""Which layers a branch may read beside the final state, and the config of an engine that gives them. No torch.

Tap i is the residual stream after i decoder layers, i = 1 up to the layer before the last: what transformers calls
hidden_states[i]. The final state, after the last norm, is always there and is no tap.
"""

from collections.abc import Sequence
from typing import Any

from mansard.composition.compose import served_config
from mansard.errors import BadInput
from mansard.records import SnapshotId
from mansard.store.store import Store

PREFIX = "CarryOnTaps"
"""Of the plugin's classes whose states are the final one and the taps, side by side."""
SERVING_PREFIX = "CarryOnStates"
"""Of those that serve users, and keep the same states for the prompts that ask."""


def check_taps(taps: Sequence[int], config: dict[str, Any]) -> None:
    """BadInput where the base has no such layer before its last."""
    layers = int(config["num_hidden_layers"])
    wrong = [tap for tap in taps if not 1 <= tap < layers]
    if wrong:
        raise BadInput(
            f"branch.taps {list(taps)}: the base has {layers} layers, so taps are from 1 to {layers - 1} (the final "
            f"state is always read); {wrong[0]} is none"
        )


def tapped_config(store: Store, base: SnapshotId, taps: Sequence[int]) -> dict[str, Any]:
    """What an engine's config.json says otherwise so that it gives the taps too; nothing where there are none."""
    if not taps:
        return {}
    architecture = served_config(store, base)["architectures"][0]
    return {"architectures": [PREFIX + architecture], "carry_on_taps": list(taps)}


def serving_config(store: Store, base: SnapshotId, taps: Sequence[int]) -> dict[str, Any]:
    """What the config.json of an engine that serves users says otherwise so that prompts may ask for their states."""
    architecture = served_config(store, base)["architectures"][0]
    return {"architectures": [SERVING_PREFIX + architecture], "carry_on_taps": list(taps)}
