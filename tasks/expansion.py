"""The expansion and its proof; and the way back, a storey taken away."""

from mansard.launch import Request
from mansard.records import Derivation, SnapshotId
from mansard.specs.data import Data
from mansard.specs.surgery import Expand, Probe, Prove
from tasks import policy
from tasks.derivation import Asked, Work, derive_one
from tasks.snapshots import TakenData

PROBE = {"probe_tokens": 64, "seed": 0}


@policy.derivation
def measure_importance(
    work: Work, model: SnapshotId, data: tuple[TakenData, ...], mixture: Data, spec: Probe
) -> Derivation:
    """What each block is worth to the mixture's general text."""
    return derive_one(work, importance_asked(model, data, mixture, spec))


@policy.derivation
def expand(work: Work, model: SnapshotId, spec: Expand, importance: Derivation | None = None) -> Derivation:
    """Pro blocks inserted, on the manifest; `importance` where they are placed by it."""
    return derive_one(work, Asked(expand_request(model, spec, importance), "expand"))


def importance_asked(model: SnapshotId, data: tuple[TakenData, ...], mixture: Data, spec: Probe) -> Asked:
    general = {s.name for s in mixture.sources if not s.is_domain}
    files = {f"data.{d.name}.train": d.train for d in data if d.name in general}
    request = Request("importance", {"model": model, **files}, spec.model_dump(mode="json"))
    return Asked(request, "importance", frozenset(files))


def expand_request(model: SnapshotId, spec: Expand, importance: Derivation | None) -> Request:
    """The probe is the importance's: its recipe names it, and no other placement's recipe does."""
    measured = {} if importance is None else {"importance": importance.snapshot}
    return Request("expand", {"model": model, **measured}, spec.model_dump(mode="json", exclude={"probe"}))


@policy.derivation
def prove(work: Work, base: SnapshotId, expansion: SnapshotId, spec: Prove) -> Derivation:
    """The expansion computes the base's function; StageFailed when it does not. Runs beside the training."""
    slices = {**PROBE, **spec.model_dump(mode="json")}
    request = Request("prove", {"base": base, "expansion": expansion}, slices)
    return derive_one(work, Asked(request, "prove"), has_bar=False)


@policy.derivation
def remove_storey(work: Work, model: SnapshotId, storey: int) -> Derivation:
    """The model without one of its storeys, on the manifest; BadInput where something was trained on it."""
    return derive_one(work, Asked(Request("remove-storey", {"model": model}, {"storey": storey}), "remove storey"))
