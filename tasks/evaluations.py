"""What an artifact answers, costs and looks like, through the engine that serves it; and the verdict on it.

An engine is started only where something is not remembered: a repeat needs none.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mansard.evaluation.contamination import check_shared
from mansard.launch import Request
from mansard.models.placement import IMPORTANCE_FILE
from mansard.models.storeys import read_expansion
from mansard.records import Derivation, SnapshotId
from mansard.specs.judging import Cost, Fingerprint, Gate, Suite
from mansard.specs.whole import Serve
from mansard.store.store import Store
from tasks import policy
from tasks.derivation import Asked, Work, derive_many, derive_one, is_remembered
from tasks.serving import engine_release, ensure_engine
from tasks.snapshots import TakenData


@dataclass(frozen=True, slots=True)
class Subject:
    """An artifact under evaluation: `who` is candidate, stable or anchor; `serve` how it is served."""

    who: str
    model_name: str
    artifact: SnapshotId
    serve: Serve


SuiteSnapshots = tuple[tuple[str, SnapshotId], ...]
FUSION_FILE = "fusion.json"
"""What stage `kept-gain` makes (its module loads torch)."""
TOLD = ("contamination",)
"""Stages whose results the report shows. Cost is a measurement: a repeat would be another verdict record."""
UNTOLD = ("judge", "cost")
"""Stages that the lineage in the report leaves out: a measurement and the verdict itself."""


@dataclass(frozen=True, slots=True)
class Background:
    """What a report tells beside the figures: suites' items, and the (stage, recipe, snapshot) of a candidate."""

    base_version: int | None
    suites: SuiteSnapshots
    stages: tuple[tuple[str, str, SnapshotId], ...]


@policy.derivation
def evaluate(
    work: Work, subject: Subject, suites: tuple[Suite, ...], snapshots: SuiteSnapshots
) -> tuple[Derivation, ...]:
    """Item records, one derivation a suite in the order of `suites`; one process for all that are not remembered."""
    serve = subject.serve.model_dump(mode="json")
    taken = dict(snapshots)
    asked = [
        Asked(
            Request(
                "evaluate",
                {"artifact": subject.artifact, "suite": taken[suite.name]},
                {"suite": suite.model_dump(mode="json"), "serve": serve, "engine": engine_release(work.site)},
            ),
            f"evaluate {subject.who} {suite.name}",
            frozenset({"suite"}),
        )
        for suite in suites
    ]
    return tuple(derive_many(work, _served(work, subject, asked)))


@policy.derivation
def take_fingerprint(work: Work, subject: Subject, spec: Fingerprint) -> Derivation:
    """The artifact's answers to the guard prompts."""
    slices = {
        "fingerprint": spec.model_dump(mode="json"),
        "serve": subject.serve.model_dump(mode="json"),
        "engine": engine_release(work.site),
    }
    asked = Asked(Request("fingerprint", {"artifact": subject.artifact}, slices), "fingerprint")
    return derive_one(work, _served(work, subject, [asked])[0])


@policy.derivation
def measure_cost(work: Work, candidate: Subject, stable: Subject, spec: Cost) -> Derivation:
    """Latency and memory of candidate and stable: a measurement, taken once and remembered."""
    slices = {
        "cost": spec.model_dump(mode="json"),
        "serve": candidate.serve.model_dump(mode="json"),
        "engine": engine_release(work.site),
    }
    request = Request("cost", {"artifact": candidate.artifact, "baseline": stable.artifact}, slices)
    if not is_remembered(work, request):
        ours = ensure_engine(work.site, candidate.model_name, candidate.artifact, candidate.serve)
        theirs = ensure_engine(work.site, stable.model_name, stable.artifact, stable.serve)
        where = {"endpoint": ours.endpoint, "served_name": ours.served_name, "pid": ours.pid}
        request = replace(
            request, where={**where, "baseline_endpoint": theirs.endpoint, "baseline_pid": theirs.pid}
        )
    return derive_one(work, Asked(request, "cost"))


@policy.derivation
def judge(
    work: Work,
    records: SuiteSnapshots,
    gate: Gate,
    suites: tuple[Suite, ...],
    attempt: int,
    background: Background,
) -> Derivation:
    """The verdict record. `records` are ("candidate.SUITE" | "baseline.SUITE" | "anchor.SUITE", snapshot) pairs;
    `attempt` is this candidate's number on these suites since the last promotion."""
    slices = {
        "gate": gate.model_dump(mode="json"),
        "suites": [suite.model_dump(mode="json") for suite in suites],
        "attempts": {"number": attempt},
        "provenance": provenance(work.store, background),
    }
    told = {stage: snapshot for stage, _, snapshot in background.stages if stage in TOLD}
    items = {f"suite.{name}": snapshot for name, snapshot in background.suites}
    return derive_one(work, Asked(Request("judge", {**dict(records), **items, **told}, slices), "judge"))


def provenance(store: Store, background: Background) -> dict[str, Any]:
    """What a report tells of a candidate beside its figures: base, training mixture, stages with what they made."""
    found: dict[str, Any] = {
        "base_version": background.base_version,
        "stages": [list(s) for s in background.stages if s[0] not in UNTOLD],
    }
    for stage, recipe, snapshot in background.stages:
        if stage == "train":
            for made in store.lineage(snapshot):
                if made["recipe"] == recipe:
                    found["sources"], found["train"] = made["spec"]["data"]["sources"], made["spec"]["train"]
        if stage == "importance":
            found["importance"] = json.loads(store.read_file(snapshot, IMPORTANCE_FILE))
            placed = next(s for name, _, s in background.stages if name == "expand")
            found["importance"]["copied"] = [b.source for b in read_expansion(store, placed).new_blocks]
        if stage == "kept-gain":
            found["fusion"] = json.loads(store.read_file(snapshot, FUSION_FILE))
        if stage == "train-branch":
            curves = json.loads(store.read_file(snapshot, "branch.json"))
            found["alphas"] = {key: curves[key] for key in ("alphas", "trained_alpha", "parameters", "bytes")}
    return found


@policy.derivation
def look_for_contamination(
    work: Work, gate: Gate, suites: SuiteSnapshots, data: tuple[TakenData, ...]
) -> Derivation:
    """Suite items that share 13-grams with training text; BadInput where a suite has more than the spec allows. Runs
    beside the stages that lead up to the training."""
    inputs = {f"suite.{name}": s for name, s in suites} | {f"data.{source.name}.train": source.train for source in data}
    asked = Asked(Request("contamination", inputs, {}), "contamination", frozenset(inputs))
    made = derive_one(work, asked, has_bar=False)
    check_shared(json.loads(work.store.read_file(made.snapshot, "contamination.json")), gate.max_shared_fraction)
    return made


def _served(work: Work, subject: Subject, asked: Sequence[Asked]) -> list[Asked]:
    """The same derivations, with the endpoint to ask where one of them is not remembered."""
    if all(is_remembered(work, a.request) for a in asked):
        return list(asked)
    engine = ensure_engine(work.site, subject.model_name, subject.artifact, subject.serve)
    where: dict[str, Any] = {"endpoint": engine.endpoint, "served_name": engine.served_name}
    return [replace(a, request=replace(a.request, where=where)) for a in asked]
