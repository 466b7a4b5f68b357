"""The quantization of a model into what is served."""

from mansard.launch import Request
from mansard.records import Derivation, SnapshotId
from mansard.specs import Quantize
from tasks import policy
from tasks.derivation import Asked, Work, derive_one
from tasks.snapshots import TakenData


@policy.derivation
def quantize(work: Work, model: SnapshotId, data: tuple[TakenData, ...], spec: Quantize) -> Derivation:
    """The artifact, calibrated on the spec's source."""
    calibration = next(d.train for d in data if d.name == spec.source)
    request = Request("quantize", {"model": model, "data": calibration}, spec.model_dump(mode="json"))
    return derive_one(work, Asked(request, "quantize", frozenset({"data"})))
