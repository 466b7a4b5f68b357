"""Stage `judge`: from item records to a verdict record and a report.

Inputs: candidate.SUITE for every suite; baseline.SUITE and anchor.SUITE where there is a version in service; and, where
they are at hand, for the report only, suite.SUITE (the items) and contamination. Spec: {"gate": specs.Gate,
"suites": [specs.Suite] in the gate's order, "attempts": {"number": k}, "provenance": {...} (facts for the report)}.
Makes verdict.json (canonical JSON), report.md, report.html and chart.png. Attempt k is judged at 6 alpha / (pi^2 k^2).
Without any baseline record the verdict is `baseline`.
"""

import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mansard.canonical import canonical_json
from mansard.digest import digest_bytes
from mansard.errors import StageFailed
from mansard.evaluation.comparison import Changes, Comparison
from mansard.evaluation.gate import Evidence, Ruling, decide, holm_levels, rule
from mansard.evaluation.item_records import Record, chance_of, measure_of, parse_lines
from mansard.evaluation.judgement import ARTIFACTS, Background, Expected, Judgement, SuiteResult
from mansard.evaluation.pairing import Bootstrap, changes, check_paired, compare_records, describe_records
from mansard.evaluation.power import alpha_of_attempt, plan_guard
from mansard.evaluation.report import render
from mansard.evaluation.suites import Item, parse_items
from mansard.evaluation.verdict_file import verdict_record
from mansard.records import SnapshotId
from mansard.specs.judging import Gate, Suite, SuiteRole

if TYPE_CHECKING:
    from mansard.worker import StageContext

CODE_VERSION = 4
PACKAGES = ("numpy", "matplotlib")
RESAMPLES_BEYOND = 20
"""A bound at a late attempt's level needs some resamples beyond it, whatever the spec asks for."""

RecordsOf = dict[str, list[Record] | None]
"""One suite's records by artifact."""


def run(context: "StageContext") -> SnapshotId:
    gate = Gate.model_validate(context.spec["gate"])
    suites = [Suite.model_validate(s) for s in context.spec["suites"]]
    attempts = dict(context.spec["attempts"])
    records = {who: _records(context, who, suites) for who in ARTIFACTS}
    judgement = judge(gate, suites, attempts, records, dict(context.inputs), _background(context, suites))
    from mansard.evaluation.chart import draw  # matplotlib takes a second
    from mansard.evaluation.html_report import render_html

    chart = draw(judgement)
    files = {
        "report.md": render(judgement).encode(),
        "report.html": render_html(judgement, chart).encode(),
        "chart.png": chart,
    }
    verdict = {**verdict_record(judgement, gate), "files": {name: digest_bytes(data) for name, data in files.items()}}
    return context.store.put_files({"verdict.json": canonical_json(verdict) + b"\n", **files})


def judge(
    gate: Gate,
    suites: list[Suite],
    attempts: dict[str, Any],
    records: dict[str, dict[str, list[Record]]],
    inputs: dict[str, SnapshotId],
    background: Background,
) -> Judgement:
    """The judgement on `records` (by artifact, then suite). Pure."""
    alpha = alpha_of_attempt(gate.alpha, attempts["number"])
    has_baseline = bool(records["baseline"])
    answered: list[RecordsOf] = [{w: records[w].get(s.name) for w in ARTIFACTS} for s in suites]
    levels = _levels(gate, suites, answered, alpha)
    results = [
        _judge_suite(role, suite, of, _bootstrap(gate, level), has_baseline, background)
        for role, suite, of, level in zip(gate.suites, suites, answered, levels, strict=True)
    ]
    verdict, reason = decide([r.ruling for r in results], [r.evidence for r in results], gate.targets)
    if not has_baseline:
        verdict, reason = "baseline", "there is no version in service to compare with"
    named = {
        who: {s.name: inputs[f"{who}.{s.name}"] for s in suites if f"{who}.{s.name}" in inputs} for who in ARTIFACTS
    }
    return Judgement(verdict, reason, gate.alpha, alpha, attempts, results, named, background)


def _levels(gate: Gate, suites: list[Suite], answered: list[RecordsOf], alpha: float) -> list[float]:
    """Each suite's one-sided level: alpha, and for targets that gate what Holm's method leaves them."""
    levels = [alpha] * len(suites)

    def passes_of(role: SuiteRole, suite: Suite, of: RecordsOf) -> Callable[[float], bool]:
        def passes(level: float) -> bool:
            return _ruled(role, suite, of, _bootstrap(gate, level)).verdict == "pass"

        return passes

    targets = [
        i
        for i, (role, suite, of) in enumerate(zip(gate.suites, suites, answered, strict=True))
        if role.role == "target" and _ruled(role, suite, of, _bootstrap(gate, alpha)).gates
    ]
    found = holm_levels([passes_of(gate.suites[i], suites[i], answered[i]) for i in targets], alpha)
    for place, level in zip(targets, found, strict=True):
        levels[place] = level
    return levels


def _bootstrap(gate: Gate, level: float) -> Bootstrap:
    return Bootstrap(level, max(gate.resamples, math.ceil(RESAMPLES_BEYOND / level)), gate.seed)


def _ruled(role: SuiteRole, suite: Suite, records: RecordsOf, bootstrap: Bootstrap) -> Ruling:
    return rule(_evidence(role, suite, records, bootstrap))


def _evidence(role: SuiteRole, suite: Suite, records: RecordsOf, bootstrap: Bootstrap) -> Evidence:
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
    against, anchor = compared["baseline"], compared["anchor"]
    return Evidence(suite.name, measure, role.role, role.margin, chance, against, anchor, bootstrap.alpha)


def _judge_suite(
    role: SuiteRole,
    suite: Suite,
    records: RecordsOf,
    bootstrap: Bootstrap,
    has_baseline: bool,
    background: Background,
) -> SuiteResult:
    evidence = _evidence(role, suite, records, bootstrap)
    after, baseline = records["candidate"] or [], records["baseline"]
    num_clusters = len({r["cluster"] for r in after})
    return SuiteResult(
        evidence=evidence,
        ruling=rule(evidence) if has_baseline else Ruling(suite.name, False, "baseline", "nothing to compare with"),
        after=describe_records(after, bootstrap),
        num_items=len(after),
        num_clusters=num_clusters,
        expected=_expected(role) if role.role == "guard" else None,
        plan=plan_guard(role, suite.kind, len(after), num_clusters, bootstrap.alpha) if role.role == "guard" else None,
        changes=changes(baseline, after, background.items.get(suite.name, {})) if baseline else Changes(),
    )


def _expected(role: SuiteRole) -> Expected:
    return Expected(role.expected_discordance, role.expected_design_effect, role.expected_standard_deviation)


def _records(context: "StageContext", who: str, suites: list[Suite]) -> dict[str, list[Record]]:
    names = [s.name for s in suites if f"{who}.{s.name}" in context.inputs]
    return {n: parse_lines(context.store.read_file(context.inputs[f"{who}.{n}"], "records.jsonl")) for n in names}


def _background(context: "StageContext", suites: list[Suite]) -> Background:
    """What a reader should know although it decides nothing."""
    return Background(
        items={s.name: _items(context, f"suite.{s.name}") for s in suites},
        contamination=_read(context, "contamination"),
        provenance=dict(context.spec.get("provenance", {})),
        notes=_notes(context),
    )


def _items(context: "StageContext", name: str) -> dict[str, Item]:
    if name not in context.inputs:
        return {}
    return {i["id"]: i for i in parse_items(context.store.read_file(context.inputs[name], "items.jsonl"))}


def _read(context: "StageContext", name: str) -> dict[str, Any] | None:
    if name not in context.inputs:
        return None
    found: dict[str, Any] = json.loads(context.store.read_file(context.inputs[name], f"{name}.json"))
    return found


def _notes(context: "StageContext") -> list[str]:
    engines = {
        name: json.loads(context.store.read_file(snapshot, "summary.json"))["engine"]["vllm"]
        for name, snapshot in context.inputs.items()
        if name.partition(".")[0] in ARTIFACTS
    }
    if len(set(engines.values())) > 1:
        told = ", ".join(f"{name} by vLLM {version}" for name, version in sorted(engines.items()))
        return [f"the records come from different engines: {told}"]
    return []
