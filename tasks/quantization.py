"""What is served of a model: its quantization, or the model itself. The process that will serve it imports vLLM
meanwhile."""

from dataclasses import dataclass

from mansard.launch import Request
from mansard.models.model_files import model_config
from mansard.records import Derivation, SnapshotId
from mansard.specs.surgery import Quantize
from tasks import policy
from tasks.derivation import Asked, Work, derive_one, is_remembered
from tasks.evidence import Quantization
from tasks.serving import prepare_engine
from tasks.snapshots import TakenData


@dataclass(frozen=True, slots=True)
class Artifact:
    """What is evaluated and served. Without quantization that is the model, and nothing was derived."""

    snapshot: SnapshotId
    derivations: tuple[Derivation, ...]


@policy.derivation
def quantize(work: Work, model: SnapshotId, data: tuple[TakenData, ...], spec: Quantize) -> Artifact:
    """The artifact, calibrated on the spec's source."""
    calibration = next((d.train for d in data if d.name == spec.source), None)
    return _quantize(work, model, calibration, spec)


@policy.derivation
def quantize_again(work: Work, model: SnapshotId, like: Quantization) -> Artifact:
    """The artifact of another model, made as that of a registered version was."""
    return _quantize(work, model, like.text, like.spec)


def _quantize(work: Work, model: SnapshotId, text: SnapshotId | None, spec: Quantize) -> Artifact:
    if spec.scheme == "none":
        return Artifact(model, ())
    assert text is not None, "awq has a source: the spec was checked"
    request = Request("quantize", {"model": model, "data": text}, spec.model_dump(mode="json"))
    if not is_remembered(work, request):
        architectures = model_config(work.store, model).get("architectures") or [""]
        prepare_engine(work.site, str(architectures[0]))
    derivation = derive_one(work, Asked(request, "quantize", frozenset({"data"})))
    return Artifact(derivation.snapshot, (derivation,))
