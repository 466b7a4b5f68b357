"""From an artifact to a registered version: evaluated, judged, signed, published. Shared by adopt, upgrade and
remove-storey."""

from collections.abc import Sequence
from dataclasses import dataclass

from flows.outcome import Outcome, outcome_of
from mansard.records import Derivation, Registration, SnapshotId
from mansard.specs.judging import Suite
from tasks.attempts import begin_attempt
from tasks.derivation import Work
from tasks.evaluations import Background, Subject, SuiteSnapshots, evaluate, judge, measure_cost, take_fingerprint
from tasks.intake import Terms
from tasks.registration import Standing, find_recorded, register
from tasks.reports import publish, verdict_of


@dataclass(frozen=True, slots=True)
class Candidate:
    """What was made so far: `model` is what later upgrades build on, `artifact` what is judged and served."""

    model: SnapshotId
    artifact: SnapshotId
    base_version: int | None
    derivations: tuple[Derivation, ...]


def recorded_outcome(work: Work, terms: Terms, candidate: Candidate) -> Outcome | None:
    """The outcome of the same wish with the same artifact, where there is one: a repeat is no new attempt."""
    found = find_recorded(work.site, terms.model_name, candidate.artifact, terms.asked)
    if found is None:
        return None
    version, registration = found
    publish(work, version, registration)  # again: an earlier run may have been killed between the two
    ours = {d.recipe for d in candidate.derivations}
    known = [Derivation(s, i, r, True, 0.0, "") for s, r, i in registration.stages if r not in ours]
    return outcome_of(work, version, registration, (*candidate.derivations, *known))


def judge_and_register(work: Work, terms: Terms, candidate: Candidate, against: Standing | None) -> Outcome:
    """Evaluate on every suite and compare with `against`; None: there is nothing to compare with."""
    name, suites, snapshots = terms.model_name, terms.suites, terms.snapshots
    attempt = 1
    if against is not None:  # before anything is seen of the candidate
        attempt = begin_attempt(
            work.site, name, candidate.artifact, terms.gate, snapshots, terms.asked, terms.author
        )
    subject = Subject("candidate", name, candidate.artifact, terms.serve)
    evaluated = evaluate(work, subject, suites, snapshots)
    fingerprint = take_fingerprint(work, subject, terms.fingerprint)
    records = named("candidate", suites, evaluated)
    cost: tuple[Derivation, ...] = ()
    if against is not None:
        stable = Subject("stable", name, against.stable_artifact, terms.serve)
        anchor = Subject("anchor", name, against.anchor_artifact, terms.serve)
        records += named("baseline", suites, evaluate(work, stable, suites, snapshots))
        records += named("anchor", suites, evaluate(work, anchor, suites, snapshots))
        cost = (measure_cost(work, subject, stable, terms.cost),)
    made = (*candidate.derivations, *evaluated, fingerprint, *cost)
    background = Background(candidate.base_version, snapshots, tuple((d.stage, d.recipe, d.snapshot) for d in made))
    verdict = judge(work, records, terms.gate, suites, attempt, background)
    derivations = (*made, verdict)
    registration = registration_of(work, terms, candidate, against, evaluated, derivations)
    version = register(work.site, registration)
    publish(work, version, registration)
    return outcome_of(work, version, registration, derivations)


def registration_of(
    work: Work,
    terms: Terms,
    candidate: Candidate,
    against: Standing | None,
    evaluated: Sequence[Derivation],
    derivations: tuple[Derivation, ...],
) -> Registration:
    """What the author signs; the last derivation is the verdict."""
    verdict = derivations[-1]
    fingerprint = next(d for d in derivations if d.stage == "fingerprint")
    return Registration(
        model_name=terms.model_name,
        model=candidate.model,
        artifact=candidate.artifact,
        verdict=verdict_of(work.store, verdict.snapshot),
        verdict_record=verdict.snapshot,
        fingerprint=fingerprint.snapshot,
        item_records=tuple((s.name, d.snapshot) for s, d in zip(terms.suites, evaluated, strict=True)),
        base_version=candidate.base_version,
        baseline_version=None if against is None else against.stable,
        anchor_version=None if against is None else against.anchor,
        author=terms.author,
        spec_name=terms.spec_name,
        spec_digest=terms.asked,
        serve=terms.serve.model_dump(mode="json"),
        release=terms.release,
        stages=tuple((d.stage, d.recipe, d.snapshot) for d in derivations),
    )


def named(who: str, suites: Sequence[Suite], records: Sequence[Derivation]) -> SuiteSnapshots:
    """The inputs of a judgement: ("WHO.SUITE", item records)."""
    return tuple((f"{who}.{s.name}", r.snapshot) for s, r in zip(suites, records, strict=True))
