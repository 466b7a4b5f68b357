"""Small frozen records that travel between parts. Standard library only."""

from dataclasses import asdict, dataclass
from typing import Any

SnapshotId = str
"""64 hex digits: BLAKE3 of a manifest."""


@dataclass(frozen=True, slots=True)
class Derivation:
    """What a stage made: `seconds` is 0 where `reused`; `log` is the stage's log file (empty where reused)."""

    stage: str
    snapshot: SnapshotId
    recipe: str
    reused: bool
    seconds: float
    log: str


@dataclass(frozen=True, slots=True)
class Registration:
    """A candidate as the journal records it. Equal registrations are one version.

    `model` is unquantized (upgrades build on it), `artifact` is what was evaluated and is served: the model itself, or
    its quantization. `verdict` is one of baseline, pass, fail, inconclusive; `verdict_record` the snapshot of
    verdict.json, report and chart. `serve` are the engine arguments that change answers, `release` the canary steps;
    both are the spec's slices, word for word. `item_records` are (suite, snapshot) pairs. `base_version` is None for an
    adopted base. `stages` are (stage, recipe, snapshot) triples in the order they ran.
    """

    model_name: str
    model: SnapshotId
    artifact: SnapshotId
    verdict: str
    verdict_record: SnapshotId
    fingerprint: SnapshotId
    item_records: tuple[tuple[str, SnapshotId], ...]
    base_version: int | None
    baseline_version: int | None
    anchor_version: int | None
    author: str
    spec_name: str
    spec_digest: str
    serve: dict[str, Any]
    release: dict[str, Any]
    stages: tuple[tuple[str, str, SnapshotId], ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Registration":
        return Registration(
            **{
                **value,
                "item_records": tuple((s, i) for s, i in value["item_records"]),
                "stages": tuple((s, r, i) for s, r, i in value["stages"]),
            }
        )
