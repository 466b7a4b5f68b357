"""`mansard customize SPEC`: a branch learns beside a base in service and becomes a version like any other.

The base's own engine gives its states away; the training node never loads it. Run again it finds what was made. Imports
prefect and mlflow: call `flows.stack.use_servers` first.
"""

from prefect import flow

from flows.judgement import Candidate, judge_and_register, recorded_outcome
from flows.outcome import Outcome
from mansard.digest import digest_json
from mansard.specs.whole import CustomizeSpec
from mansard.store.store import Store
from tasks.attempts import expected_attempt
from tasks.carry_on import capture, carry_on_base, choose_alpha, compose, train_branch
from tasks.derivation import recorded
from tasks.evaluations import look_for_contamination
from tasks.intake import check_power, read_order, terms_of
from tasks.registration import standing
from tasks.snapshots import resolve_version, take_data, take_suites


@flow(name="customize", flow_run_name="customize {spec_path}", persist_result=False)
def customize(spec_path: str, site_path: str, as_person: str | None = None, model: str | None = None) -> Outcome:
    """Raises BadInput or NotAllowed before anything starts, Conflict while nothing is stable, StageFailed later."""
    order = read_order(CustomizeSpec, spec_path, site_path, model, as_person)
    spec, version = order.spec, resolve_version(order)
    base = carry_on_base(order, version)
    against = standing(order.site, order.model_name, spec.gate.anchor_version)
    terms = terms_of(order, suites := take_suites(order))
    attempt = expected_attempt(order.site, order.model_name, suites, terms.asked)
    check_power(Store.of(order.site), terms, attempt)
    key = digest_json({"verb": "customize", "asked": terms.asked, "base": version})
    tags = {"mansard_author": order.author, "mansard_base_version": str(base.version)}
    with recorded(order.site, order.model_name, f"customize {spec.name}", key, tags) as work:
        data = take_data(work, spec.data)
        clean = look_for_contamination(work, spec.gate, suites, data)
        captured = capture(work, base, data, spec)
        branch = train_branch(work, base, captured.snapshot, spec)
        alpha = choose_alpha(work, branch.snapshot, spec)
        artifact = compose(work, base, branch.snapshot, alpha)
        made = (clean, captured, branch, artifact)
        candidate = Candidate(base.model, artifact.snapshot, base.version, made)
        return recorded_outcome(work, terms, candidate) or judge_and_register(work, terms, candidate, against)
