"""The training of the inserted blocks."""

import json
from dataclasses import replace
from typing import Any

from mansard.errors import BadInput
from mansard.launch import Request
from mansard.records import Derivation, SnapshotId
from mansard.site import Site
from mansard.specs import Data, Train
from tasks import policy
from tasks.derivation import Asked, Work, derive_one
from tasks.snapshots import TakenData


@policy.derivation
def train(work: Work, expansion: SnapshotId, data: tuple[TakenData, ...], mixture: Data, spec: Train) -> Derivation:
    """The trained tensors. A killed one goes on from its checkpoint when it is asked for again."""
    files = {f"data.{d.name}.train": d.train for d in data} | {f"data.{d.name}.held_out": d.held_out for d in data}
    request = Request(
        "train",
        {"expansion": expansion, **files},
        {"data": mixture.model_dump(mode="json"), "train": spec.model_dump(mode="json")},
    )
    request = replace(request, where=ranks_of(work.site))
    return derive_one(work, Asked(request, "train", frozenset(files)))


def ranks_of(site: Site) -> dict[str, Any]:
    """How the stage runs in several processes, where the site says so. It changes no recipe: a run of another number
    of processes goes on from the same checkpoint, and its result is the same but for rounding."""
    training = site.training
    if training.processes == 1:
        return {}
    assert training.deepspeed is not None, "load_site has checked it"
    try:
        config = json.loads(training.deepspeed.read_bytes())
    except (OSError, ValueError) as error:
        where = f"{training.deepspeed}: not a DeepSpeed configuration"
        raise BadInput(f"{where} ({error}); configs/deepspeed has some") from error
    return {
        "ranks": {
            "processes": training.processes,
            "config": config,
            "hang_seconds": float(training.hang_seconds),
            "launcher": list(training.launcher),
        }
    }
