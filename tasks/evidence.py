"""How a registered version was made and judged, from the lineage of its snapshots: no spec file is needed to do it
again. Loads neither prefect nor mlflow.

Corrupt where a record is lost; BadInput where a suite's file is no longer the one that the version was judged on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mansard.digest import digest_json
from mansard.errors import BadInput, Corrupt
from mansard.evaluation.suites import suite_files
from mansard.records import Registration, SnapshotId
from mansard.release.journal import Journal
from mansard.site import Site
from mansard.specs.judging import Cost, Fingerprint, Gate, Suite
from mansard.specs.surgery import Quantize
from mansard.specs.whole import Serve
from mansard.store.store import Store
from tasks.intake import Terms


@dataclass(frozen=True, slots=True)
class Evidence:
    """How a registered version was judged; `snapshots` are (suite, snapshot) pairs in the order of `suites`."""

    gate: Gate
    serve: Serve
    suites: tuple[Suite, ...]
    snapshots: tuple[tuple[str, SnapshotId], ...]
    cost: Cost


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a registered artifact was quantized: the settings, and the text that calibrated them (None: not at all)."""

    spec: Quantize
    text: SnapshotId | None


def recorded_version(site: Site, model_name: str, version: int) -> Registration:
    """The newest registration of a version; BadInput for an unknown one."""
    with Journal.open(site.journal) as journal:
        return journal.registration(model_name, version)


def recorded_evidence(site: Site, registration: Registration) -> Evidence:
    """Gate, suites, serving and cost of a version."""
    store = Store.of(site)
    judged = _lineage(store, "judge", registration.verdict_record)
    suites = tuple(Suite.model_validate(suite) for suite in judged["spec"]["suites"])
    gate = Gate.model_validate(judged["spec"]["gate"])
    snapshots = []
    for name, records in registration.item_records:
        made = _lineage(store, "evaluate", records, {"artifact": registration.artifact})
        snapshots.append((name, made["inputs"]["suite"]))
    costs = [snapshot for stage, _, snapshot in registration.stages if stage == "cost"]
    cost = Cost.model_validate(_lineage(store, "cost", costs[-1])["spec"]["cost"]) if costs else Cost()
    return Evidence(gate, Serve.model_validate(registration.serve), suites, tuple(snapshots), cost)


def recorded_quantization(site: Site, registration: Registration) -> Quantization:
    """Settings and calibration text of the version's artifact. One that is the version's model is not quantized."""
    if registration.artifact == registration.model:
        return Quantization(Quantize(scheme="none"), None)
    lineage = _lineage(Store.of(site), "quantize", registration.artifact, {"model": registration.model})
    settings = lineage["spec"]
    if settings["scheme"] == "W4A16_ASYM":  # what was written before 2026-12
        settings = {**settings, "scheme": "awq", "symmetric": False}
    return Quantization(Quantize.model_validate(settings), lineage["inputs"]["data"])


def terms_without_targets(site: Site, registration: Registration, author: str, asked: dict[str, Any]) -> Terms:
    """How what is left of a version is judged: its own guards hold against stable and anchor, its targets are reported.

    What takes something away improves nothing, so a target that must improve would forbid it; a person reads in the
    report what is given up. `asked` says what is asked for, beside the evidence.
    """
    evidence, store = recorded_evidence(site, registration), Store.of(site)
    snapshots = evidence.snapshots
    roles = [r.model_copy(update={"role": "report"}) if r.role == "target" else r for r in evidence.gate.suites]
    gate = evidence.gate.model_copy(update={"suites": roles})
    fingerprint = _lineage(store, "fingerprint", registration.fingerprint, {"artifact": registration.artifact})
    return Terms(
        model_name=registration.model_name,
        author=author,
        spec_name=registration.spec_name,
        asked=digest_json({**asked, "gate": gate.model_dump(mode="json"), "suites": [list(s) for s in snapshots]}),
        suites=evidence.suites,
        snapshots=snapshots,
        serve=evidence.serve,
        gate=gate,
        fingerprint=Fingerprint.model_validate(fingerprint["spec"]["fingerprint"]),
        cost=evidence.cost,
        release=registration.release,
    )


def check_suites_unchanged(site: Site, evidence: Evidence, version: int) -> None:
    """BadInput where a suite's file under the site's data holds other items than the version was judged on.

    A file that is gone is no trouble: the store has its items.
    """
    store = Store.of(site)
    for suite, (_, snapshot) in zip(evidence.suites, evidence.snapshots, strict=True):
        path = None if suite.items is None else site.data / suite.items
        if path is None or not path.exists():
            continue
        if suite_files(suite, site.data)["items.jsonl"] != store.read_file(snapshot, "items.jsonl"):
            raise BadInput(_changed(suite, path, version, snapshot))


def _changed(suite: Suite, path: Path, version: int, snapshot: SnapshotId) -> str:
    return (
        f"suite {suite.name}: {path} has changed since version {version} was evaluated on it; bring the old items back "
        f"(mansard restore {snapshot[:12]} DIR), or run the upgrade again, which evaluates on the new ones"
    )


def _lineage(
    store: Store, stage: str, snapshot: SnapshotId, inputs: Mapping[str, SnapshotId] | None = None
) -> dict[str, Any]:
    """The record of the stage that made a snapshot (from these inputs, where some are named)."""
    for made in store.lineage(snapshot):
        if made["stage"] == stage and (inputs or {}).items() <= made["inputs"].items():
            return made
    raise Corrupt(f"snapshot {snapshot}: no record of the {stage} that made it in {store.root}; run the upgrade again")
