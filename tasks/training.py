"""The training of the inserted blocks."""

from mansard.launch import Request
from mansard.records import Derivation, SnapshotId
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
    return derive_one(work, Asked(request, "train", frozenset(files)))
