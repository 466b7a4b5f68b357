"""Stage `fuse`: trained tensors take their places, and the plain checkpoint answers as the trained model did.

The fusion itself reads no tensor. The fused model is then loaded by transformers alone and asked the probe that the
training left behind (`probe.safetensors`: input_ids [B, T], logits [B, T, V]), in the type and by the attention kernel
in which that was computed (`training.json`); every byte of the logits must be the same. A probe that was computed on
another kind of device is refused.
"""

import json
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from mansard.errors import BadInput, StageFailed
from mansard.models.fuse import fuse
from mansard.models.loading import choose_device, load_model
from mansard.models.probe import are_bit_equal, forward_logits, max_abs_difference
from mansard.records import SnapshotId

if TYPE_CHECKING:
    from mansard.worker import StageContext

CODE_VERSION = 3
PACKAGES = ("torch", "transformers", "safetensors")

PROBE_FILE = "probe.safetensors"
TRAINING_FILE = "training.json"


def run(context: "StageContext") -> SnapshotId:
    store = context.store
    input_ids_BT, logits_BTV = read_probe(store.read_file(context.inputs["trained"], PROBE_FILE))
    kernel = read_kernel(store.read_file(context.inputs["trained"], TRAINING_FILE))
    context.progress(0, 2, "steps", "placing trained tensors")
    fused = fuse(store, context.inputs["expansion"], context.inputs["trained"])
    context.progress(1, 2, "steps", "asking the fused model the training's probe")
    with store.using(fused) as path:
        model = load_model(path, logits_BTV.dtype, device=choose_device())
        found_BTV = forward_logits(model, input_ids_BT, kernel)
    if found_BTV.shape != logits_BTV.shape:
        shapes = f"{list(found_BTV.shape)}, those of the trained model {list(logits_BTV.shape)}"
        raise StageFailed(f"the fused model is not the trained one: its logits have the shape {shapes}")
    if not are_bit_equal(found_BTV, logits_BTV):
        raise StageFailed(
            f"the fused model is not the trained one: logits in {str(logits_BTV.dtype).removeprefix('torch.')} differ "
            f"by up to {max_abs_difference(found_BTV, logits_BTV):.6g} on the training's probe (attention kernel "
            f"{kernel}); they must be equal"
        )
    context.progress(2, 2, "steps", "equal")
    return fused


def read_probe(data: bytes) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and logits of a training's probe; BadInput when the file is not one."""
    try:
        tensors = load(data)
        input_ids_BT, logits_BTV = tensors["input_ids"], tensors["logits"]
    except (SafetensorError, KeyError) as error:
        raise BadInput(f"{PROBE_FILE}: no tensors input_ids and logits: {error}; train again") from error
    if input_ids_BT.dtype != torch.int64 or logits_BTV.shape[:-1] != input_ids_BT.shape:
        shapes = f"input_ids {list(input_ids_BT.shape)}, logits {list(logits_BTV.shape)}"
        raise BadInput(f"{PROBE_FILE}: {shapes}; [B, T] and [B, T, V] are expected: train again")
    return input_ids_BT, logits_BTV


def read_kernel(data: bytes) -> str:
    """The attention kernel by which a training's probe was computed; BadInput where its record names none."""
    try:
        return str(json.loads(data)["probe"]["kernel"])
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{TRAINING_FILE}: no probe.kernel in it ({error!r:.80}); train again") from error
