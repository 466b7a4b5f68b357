"""verdict.json: a judgement as JSON and back, complete enough to tell the whole report again. Pure.

Only what a reader of the record never needs stays out: the items of the suites. Records of an older code version lack
some keys; what they do not say is left out of what is told of them.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mansard.evaluation.comparison import Change, Changes, Comparison, Estimate, Spread
from mansard.evaluation.gate import Evidence, Ruling, Verdict
from mansard.evaluation.judgement import ARTIFACTS, Background, Expected, Judgement, Plan, SuiteResult, outcome_of
from mansard.evaluation.wording import ITEMS_LISTED

if TYPE_CHECKING:
    from mansard.specs.judging import Gate


def verdict_record(judgement: Judgement, gate: "Gate") -> dict[str, Any]:
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
        "contamination": _contamination_json(judgement.background.contamination),
        "provenance": dict(judgement.background.provenance),
        "notes": list(judgement.background.notes),
    }


def judgement_of(record: Mapping[str, Any]) -> Judgement:
    """The judgement that a verdict record tells of."""
    gate = record["gate"]
    found = record.get("contamination")
    background = Background(
        items={},
        contamination=None if found is None else {"suites": found},
        provenance=record.get("provenance", {}),
        notes=record["notes"],
    )
    pairs = zip(record["suites"], gate["suites"], strict=True)
    suites = [_suite_of(suite, role, record["alpha_spent"]) for suite, role in pairs]
    return Judgement(
        verdict=record["verdict"],
        reason=record["reason"],
        budget=gate["alpha"],
        alpha=record["alpha_spent"],
        attempts=record["attempts"],
        suites=suites,
        inputs={who: record["inputs"][who] for who in ARTIFACTS},
        background=background,
    )


def _suite_json(result: SuiteResult) -> dict[str, Any]:
    evidence = result.evidence
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
        "after": asdict(result.after),
        "baseline": evidence.baseline.as_json() if evidence.baseline else None,
        "anchor": evidence.anchor.as_json() if evidence.anchor else None,
        "level": evidence.level,
        "planned": asdict(result.plan) if result.plan else None,
        "changes": asdict(result.changes),
    }


def _suite_of(suite: Mapping[str, Any], role: Mapping[str, Any], alpha: float) -> SuiteResult:
    evidence = Evidence(
        suite=suite["suite"],
        measure=suite["measure"],
        role=suite["role"],
        margin=suite["margin"],
        chance=suite["chance"],
        baseline=_comparison_of(suite["baseline"]),
        anchor=_comparison_of(suite["anchor"]),
        level=suite.get("level", alpha),
    )
    verdict: Verdict = "inconclusive" if suite["verdict"] == "reported" else suite["verdict"]
    planned, changed = suite.get("planned"), suite.get("changes")
    return SuiteResult(
        evidence=evidence,
        ruling=Ruling(evidence.suite, suite["gates"], verdict, suite["reason"]),
        after=Estimate(**suite["after"]),
        num_items=suite["num_items"],
        num_clusters=suite["num_clusters"],
        expected=_expected_of(role) if planned else None,
        plan=Plan(**planned) if planned else None,
        changes=_changes_of(changed) if changed else Changes(),
    )


def _expected_of(role: Mapping[str, Any]) -> Expected:
    return Expected(
        discordance=role["expected_discordance"],
        design_effect=role["expected_design_effect"],
        standard_deviation=role["expected_standard_deviation"],
    )


def _comparison_of(found: Mapping[str, Any] | None) -> Comparison | None:
    if found is None:
        return None
    estimates = {name: Estimate(**found[name]) for name in ("before", "after", "effect")}
    spread = found.get("spread")
    return Comparison(
        num_items=found["num_items"],
        num_clusters=found["num_clusters"],
        **estimates,
        detectable=found["detectable"],
        spread=Spread(**spread) if spread else None,
    )


def _changes_of(found: Mapping[str, Any]) -> Changes:
    worst, best = (tuple(Change(**c) for c in found[name]) for name in ("worst", "best"))
    return Changes(found["num_worse"], found["num_better"], worst, best)


def _contamination_json(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {name: {**s, "listed": s["listed"][:ITEMS_LISTED]} for name, s in found["suites"].items()}
