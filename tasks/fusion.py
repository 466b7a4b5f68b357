"""The fusion of trained tensors and expansion into one plain model: of the expanded depth, or averaged into the base.
"""

from dataclasses import dataclass

from mansard.launch import Request
from mansard.records import Derivation, SnapshotId
from mansard.specs.judging import Suite
from mansard.specs.surgery import Fuse
from mansard.specs.whole import UpgradeSpec
from tasks import policy
from tasks.derivation import Asked, Work, derive_one
from tasks.evaluations import SuiteSnapshots
from tasks.snapshots import TakenData


@dataclass(frozen=True, slots=True)
class Averaged:
    """The three models that are compared."""

    base: SnapshotId
    expanded: SnapshotId
    averaged: SnapshotId


@policy.derivation
def fuse(work: Work, expansion: SnapshotId, trained: SnapshotId) -> Derivation:
    """A plain checkpoint of the expanded depth, reloaded and compared with what was trained."""
    request = Request("fuse", {"expansion": expansion, "trained": trained}, {"method": "residual"})
    return derive_one(work, Asked(request, "fuse"))


@policy.derivation
def average(work: Work, fused: SnapshotId, spec: Fuse) -> Derivation:
    """The fused model's newest storey averaged into its base, at the base's depth."""
    return derive_one(work, Asked(Request("average", {"model": fused}, {"weight": spec.share}), "average"))


@policy.derivation
def measure_kept_gain(
    work: Work,
    models: Averaged,
    spec: UpgradeSpec,
    data: tuple[TakenData, ...],
    suites: tuple[Suite, ...],
    snapshots: SuiteSnapshots,
) -> Derivation:
    """What the average keeps of the gain, on held-out text and on the gate's suites in bits per byte."""
    return derive_one(work, kept_gain_asked(models, spec, data, suites, snapshots))


def kept_gain_asked(
    models: Averaged,
    spec: UpgradeSpec,
    data: tuple[TakenData, ...],
    suites: tuple[Suite, ...],
    snapshots: SuiteSnapshots,
) -> Asked:
    taken, held_out = dict(snapshots), {d.name: d.held_out for d in data}
    measured = [(role, s) for role, s in zip(spec.gate.suites, suites, strict=True) if s.kind == "bits_per_byte"]
    texts = {f"data.{s.name}.held_out": held_out[s.name] for s in spec.data.sources}
    texts |= {f"suite.{s.name}": taken[s.name] for role, s in measured if role.role != "report"}
    gains = [f"data.{s.name}.held_out" for s in spec.data.sources if s.is_domain]
    gains += [f"suite.{s.name}" for role, s in measured if role.role == "target"]
    slices = {
        "weight": spec.fuse.share,
        "sequence_tokens": spec.data.sequence_tokens,
        "gains": gains,
        "guards": [name for name in texts if name not in gains],
    }
    compared = {"base": models.base, "expanded": models.expanded, "averaged": models.averaged}
    return Asked(Request("kept-gain", {**compared, **texts}, slices), "kept gain", frozenset(texts))
