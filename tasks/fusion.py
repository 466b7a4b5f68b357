"""The fusion of trained tensors and expansion into one plain model."""

from mansard.launch import Request
from mansard.records import Derivation, SnapshotId
from mansard.specs import Fuse
from tasks import policy
from tasks.derivation import Asked, Work, derive_one


@policy.derivation
def fuse(work: Work, expansion: SnapshotId, trained: SnapshotId, spec: Fuse) -> Derivation:
    """A plain checkpoint, reloaded and compared with what was trained."""
    request = Request("fuse", {"expansion": expansion, "trained": trained}, spec.model_dump(mode="json"))
    return derive_one(work, Asked(request, "fuse"))
