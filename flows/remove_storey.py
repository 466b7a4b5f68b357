"""`mansard remove-storey VERSION STOREY`: a version without one of its storeys is a candidate, judged like any other.

The removal is done on the manifest. Quantization, suites, guards and the way of serving are those of the version's
recorded evidence, so no spec file is needed; its targets are reported, because what is taken away improves nothing.
Imports prefect and mlflow: call `flows.stack.use_servers` first.
"""

from pathlib import Path

from prefect import flow

from flows.judgement import Candidate, judge_and_register, recorded_outcome
from flows.outcome import Outcome
from mansard.digest import digest_json
from mansard.site import load_site
from mansard.store.store import Store
from tasks.attempts import expected_attempt
from tasks.derivation import recorded
from tasks.evidence import recorded_quantization, recorded_version, terms_without_targets
from tasks.expansion import remove_storey as take_away
from tasks.intake import check_power
from tasks.quantization import quantize_again
from tasks.registration import standing


@flow(name="remove-storey", flow_run_name="remove storey {storey} of {version}", persist_result=False)
def remove_storey(version: int, storey: int, site_path: str, author: str, model: str | None = None) -> Outcome:
    """Raises BadInput where the storey cannot be taken away, Conflict while nothing is stable. A repeat is the same
    version."""
    site = load_site(Path(site_path))
    name = site.model_named(model)
    registration = recorded_version(site, name, version)
    wish = {"verb": "remove-storey", "model": registration.model, "storey": storey}
    terms = terms_without_targets(site, registration, author, wish)
    against = standing(site, name, terms.gate.anchor_version)
    attempt = expected_attempt(site, name, terms.snapshots, terms.asked)
    check_power(Store.of(site), terms, attempt)
    tags = {"mansard_author": author, "mansard_base_version": str(version)}
    with recorded(site, name, f"remove storey {storey} of {version}", digest_json(wish), tags) as work:
        rest = take_away(work, registration.model, storey)
        artifact = quantize_again(work, rest.snapshot, recorded_quantization(site, registration))
        candidate = Candidate(rest.snapshot, artifact.snapshot, version, (rest, *artifact.derivations))
        return recorded_outcome(work, terms, candidate) or judge_and_register(work, terms, candidate, against)
