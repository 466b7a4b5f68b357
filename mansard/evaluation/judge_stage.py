"""Stage `judge`: from item records to a verdict record, a report and a chart.

Inputs: candidate.SUITE for every suite; baseline.SUITE and anchor.SUITE where there is a version in service. Spec:
{"gate": specs.Gate, "suites": [specs.Suite] in the gate's order, "attempts": {"number": k, ...}}. Makes verdict.json
(canonical JSON), report.md and chart.png. Without any baseline record the verdict is `baseline`.
"""

import json
from typing import TYPE_CHECKING, Any

from mansard.canonical import canonical_json
from mansard.digest import digest_bytes
from mansard.errors import StageFailed
from mansard.evaluation.gate import Evidence, Ruling, decide, rule
from mansard.evaluation.item_records import Record, chance_of, measure_of, parse_lines
from mansard.evaluation.pairing import Bootstrap, changes, check_paired, compare_records, describe_records
from mansard.evaluation.report import Judgement, SuiteResult, outcome_of, render
from mansard.evaluation.statistics import Comparison
from mansard.records import SnapshotId
from mansard.specs import Gate, Suite, SuiteRole

if TYPE_CHECKING:
    from mansard.worker import StageContext

CODE_VERSION = 1
PACKAGES = ("numpy", "matplotlib")
ARTIFACTS = ("candidate", "baseline", "anchor")


def run(context: "StageContext") -> SnapshotId:
    gate = Gate.model_validate(context.spec["gate"])
    suites = [Suite.model_validate(s) for s in context.spec["suites"]]
    attempts = dict(context.spec["attempts"])
    records = {who: _records(context, who, suites) for who in ARTIFACTS}
    judgement = judge(gate, suites, attempts, records, dict(context.inputs), _notes(context))
    from mansard.evaluation.chart import draw  # matplotlib takes a second

    files = {"report.md": render(judgement).encode(), "chart.png": draw(judgement)}
    verdict = {**verdict_record(judgement, gate), "files": {name: digest_bytes(data) for name, data in files.items()}}
    return context.store.put_files({"verdict.json": canonical_json(verdict) + b"\n", **files})


def judge(
    gate: Gate,
    suites: list[Suite],
    attempts: dict[str, Any],
    records: dict[str, dict[str, list[Record]]],
    inputs: dict[str, SnapshotId],
    notes: list[str],
) -> Judgement:
    """The judgement on `records` (by artifact, then suite). Pure."""
    bootstrap = Bootstrap(gate.alpha, gate.resamples, gate.seed)
    has_baseline = bool(records["baseline"])
    results = [
        _judge_suite(role, suite, {w: records[w].get(suite.name) for w in ARTIFACTS}, bootstrap, has_baseline)
        for role, suite in zip(gate.suites, suites, strict=True)
    ]
    verdict, reason = decide([r.ruling for r in results], [r.evidence for r in results])
    if not has_baseline:
        verdict, reason = "baseline", "there is no version in service to compare with"
    named = {
        who: {s.name: inputs[f"{who}.{s.name}"] for s in suites if f"{who}.{s.name}" in inputs} for who in ARTIFACTS
    }
    return Judgement(verdict, reason, gate.alpha, attempts, results, named, notes)


def verdict_record(judgement: Judgement, gate: Gate) -> dict[str, Any]:
    """verdict.json but for the digests of the files beside it."""
    return {
        "format": 1,
        "verdict": judgement.verdict,
        "reason": judgement.reason,
        "gate": gate.model_dump(mode="json"),
        "alpha_spent": judgement.alpha,
        "attempts": dict(judgement.attempts),
        "inputs": {who: dict(s) for who, s in judgement.inputs.items()},
        "suites": [_suite_json(s) for s in judgement.suites],
        "notes": list(judgement.notes),
    }


def _judge_suite(
    role: SuiteRole,
    suite: Suite,
    records: dict[str, list[Record] | None],
    bootstrap: Bootstrap,
    has_baseline: bool,
) -> SuiteResult:
    after = records["candidate"]
    if not after:
        raise StageFailed(f"suite {suite.name}: the candidate has no records")
    compared: dict[str, Comparison | None] = {}
    for who in ("baseline", "anchor"):
        before = records[who]
        if before is None:
            compared[who] = None
            continue
        check_paired(suite.name, f"the {who}", before, after)
        compared[who] = compare_records(before, after, bootstrap)
    measure = measure_of(after)
    chance = round(chance_of(after), 6) if measure == "accuracy" else 0.0
    evidence = Evidence(suite.name, measure, role.role, role.margin, chance, compared["baseline"], compared["anchor"])
    baseline = records["baseline"]
    return SuiteResult(
        evidence=evidence,
        ruling=rule(evidence) if has_baseline else Ruling(suite.name, False, "baseline", "nothing to compare with"),
        after=describe_records(after, bootstrap),
        num_items=len(after),
        num_clusters=len({r["cluster"] for r in after}),
        changes=changes(baseline, after) if baseline else (),
    )


def _suite_json(result: SuiteResult) -> dict[str, Any]:
    evidence, after = result.evidence, result.after
    return {
        "suite": evidence.suite,
        "measure": evidence.measure,
        "role": evidence.role,
        "margin": evidence.margin,
        "chance": evidence.chance,
        "gates": result.ruling.gates,
        "verdict": outcome_of(result),
        "reason": result.ruling.reason,
        "num_items": result.num_items,
        "num_clusters": result.num_clusters,
        "after": {"value": after.value, "low": after.low, "high": after.high},
        "baseline": evidence.baseline.as_json() if evidence.baseline else None,
        "anchor": evidence.anchor.as_json() if evidence.anchor else None,
    }


def _records(context: "StageContext", who: str, suites: list[Suite]) -> dict[str, list[Record]]:
    names = [s.name for s in suites if f"{who}.{s.name}" in context.inputs]
    return {n: parse_lines(context.store.read_file(context.inputs[f"{who}.{n}"], "records.jsonl")) for n in names}


def _notes(context: "StageContext") -> list[str]:
    """What a reader should know although it decides nothing."""
    engines = {
        name: json.loads(context.store.read_file(snapshot, "summary.json"))["engine"]["vllm"]
        for name, snapshot in context.inputs.items()
    }
    if len(set(engines.values())) > 1:
        told = ", ".join(f"{name} by vLLM {version}" for name, version in sorted(engines.items()))
        return [f"the records come from different engines: {told}"]
    return []
