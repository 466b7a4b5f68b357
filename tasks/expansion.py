"""The expansion and its proof; and the way back, a storey taken away."""

from mansard.launch import Request
from mansard.records import Derivation, SnapshotId
from mansard.specs import Expand, Prove
from tasks import policy
from tasks.derivation import Asked, Work, derive_one

PROBE = {"probe_tokens": 64, "seed": 0}


@policy.derivation
def expand(work: Work, model: SnapshotId, spec: Expand) -> Derivation:
    """Pro blocks inserted, on the manifest."""
    request = Request("expand", {"model": model}, spec.model_dump(mode="json"))
    return derive_one(work, Asked(request, "expand"))


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
