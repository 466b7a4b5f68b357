"""`mansard gate VERSION`: judges a registered version again, against today's stable and anchor.

Suites, gate settings and the way of serving are those of its recorded evidence, so no spec file is needed and item
records are reused. The version keeps its number; the new verdict needs a new approval. Imports prefect and mlflow:
call `flows.stack.use_servers` first.
"""

from dataclasses import replace
from pathlib import Path

from prefect import flow

from flows.judgement import named
from flows.outcome import Outcome, outcome_of
from mansard.digest import digest_json
from mansard.errors import Conflict
from mansard.site import load_site
from tasks.attempts import begin_attempt
from tasks.derivation import recorded
from tasks.evaluations import Background, Subject, evaluate, judge, measure_cost
from tasks.evidence import recorded_evidence, recorded_version
from tasks.registration import register_judgement, standing
from tasks.reports import publish, verdict_of


@flow(name="gate", flow_run_name="gate {version}", persist_result=False)
def gate(version: int, site_path: str, model: str | None = None) -> Outcome:
    """Raises BadInput for an unknown version, Conflict where it is stable or nothing is."""
    site = load_site(Path(site_path))
    name = site.model_named(model)
    registration = recorded_version(site, name, version)
    evidence = recorded_evidence(site, registration)
    against = standing(site, name, evidence.gate.anchor_version)
    if against.stable == version:
        raise Conflict(f"{name} version {version} is stable; it is what others are judged against")
    key = digest_json({"verb": "gate", "version": version, "against": [against.stable, against.anchor]})
    with recorded(site, name, f"gate {version}", key, {"mansard_version": str(version)}) as work:
        attempt = begin_attempt(
            site, name, registration.artifact, evidence.gate, evidence.snapshots, registration.spec_digest,
            registration.author,
        )  # fmt: skip
        subjects = {
            "candidate": Subject("candidate", name, registration.artifact, evidence.serve),
            "baseline": Subject("stable", name, against.stable_artifact, evidence.serve),
            "anchor": Subject("anchor", name, against.anchor_artifact, evidence.serve),
        }
        evaluated = {w: evaluate(work, s, evidence.suites, evidence.snapshots) for w, s in subjects.items()}
        # A canary's latency is held against this ratio, so it has to be that to today's stable.
        cost = measure_cost(work, subjects["candidate"], subjects["baseline"], evidence.cost)
        records = tuple(pair for who, made in evaluated.items() for pair in named(who, evidence.suites, made))
        background = Background(registration.base_version, evidence.snapshots, registration.stages)
        verdict = judge(work, records, evidence.gate, evidence.suites, attempt, background)
        judged = replace(
            registration,
            verdict=verdict_of(work.store, verdict.snapshot),
            verdict_record=verdict.snapshot,
            item_records=tuple(
                (s.name, d.snapshot) for s, d in zip(evidence.suites, evaluated["candidate"], strict=True)
            ),
            baseline_version=against.stable,
            anchor_version=against.anchor,
            stages=(
                *(made for made in registration.stages if made[0] != cost.stage),
                (cost.stage, cost.recipe, cost.snapshot),
            ),
        )
        register_judgement(site, version, judged, f"the baseline is version {against.stable} now")
        publish(work, version, judged)
        derivations = (*(d for made in evaluated.values() for d in made), cost, verdict)
        return outcome_of(work, version, judged, derivations)
