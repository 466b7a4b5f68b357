"""The verdict where people look: report, chart and results on the parent run in MLflow and on the flow's page."""

import json
import re
from dataclasses import dataclass
from typing import Any

from prefect.artifacts import create_image_artifact, create_markdown_artifact

from mansard.evaluation.published import published_files
from mansard.records import Registration, SnapshotId
from mansard.store.store import Store
from tasks import policy, tracking
from tasks.derivation import Work


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """One suite's line of a verdict. `before` and `interval` (of the change) are None without a version in service."""

    suite: str
    role: str
    measure: str
    before: float | None
    after: float
    effect: float | None
    interval: tuple[float, float] | None
    verdict: str
    num_items: int


@policy.record
def publish(work: Work, version: int, registration: Registration) -> None:
    """Put the evidence of a version into MLflow and Prefect. A repeat writes the same again."""
    files = published_files(work.store, registration)
    tracking.log_files(work.run, files, "verdict")
    results = results_of(work.store, registration.verdict_record)
    metrics = {f"{r.suite}.after": r.after for r in results}
    metrics |= {f"{r.suite}.before": r.before for r in results if r.before is not None}
    metrics |= {f"{r.suite}.change": r.effect for r in results if r.effect is not None}
    tags = {"mansard_version": str(version), "mansard_verdict": registration.verdict}
    tracking.log_results(work.run, metrics, {**tags, "mansard_artifact": registration.artifact}, registration.artifact)
    chart = tracking.artifact_url(work.run, "verdict/chart.png")
    key = re.sub(r"[^a-z0-9-]", "-", f"mansard-{registration.model_name}-{version}".lower())
    title = f"{registration.model_name} version {version}: {registration.verdict}"
    report = files["report.md"].decode().replace("(chart.png)", f"({chart})")
    create_markdown_artifact(report, key=f"{key}-report", description=title)
    create_image_artifact(chart, key=f"{key}-chart", description=title)


def results_of(store: Store, verdict_record: SnapshotId) -> tuple[SuiteResult, ...]:
    """The suites of a verdict record, in the gate's order."""
    verdict: dict[str, Any] = json.loads(store.read_file(verdict_record, "verdict.json"))
    return tuple(_result(suite) for suite in verdict["suites"])


def verdict_of(store: Store, verdict_record: SnapshotId) -> str:
    """pass, fail, inconclusive or baseline."""
    return str(json.loads(store.read_file(verdict_record, "verdict.json"))["verdict"])


def _result(suite: dict[str, Any]) -> SuiteResult:
    compared = suite["baseline"]
    effect = None if compared is None else compared["effect"]
    has_interval = effect is not None and effect["low"] is not None
    return SuiteResult(
        suite=suite["suite"],
        role=suite["role"],
        measure=suite["measure"],
        before=None if compared is None else compared["before"]["value"],
        after=suite["after"]["value"],
        effect=None if effect is None else effect["value"],
        interval=(effect["low"], effect["high"]) if effect is not None and has_interval else None,
        verdict=suite["verdict"],
        num_items=suite["num_items"],
    )
