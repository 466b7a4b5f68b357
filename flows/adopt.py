"""`mansard adopt SPEC`: takes a first base: quantized or as it is, evaluated alone, registered as `baseline`.

Imports prefect and mlflow: call `flows.stack.use_servers` first.
"""

from prefect import flow

from flows.judgement import Candidate, judge_and_register, recorded_outcome
from flows.outcome import Outcome
from mansard.digest import digest_json
from mansard.specs.whole import AdoptSpec
from tasks.derivation import recorded
from tasks.intake import read_order, terms_of
from tasks.quantization import quantize
from tasks.snapshots import check_base, resolve_version, take_base, take_data, take_suites


@flow(name="adopt", flow_run_name="adopt {spec_path}", persist_result=False)
def adopt(spec_path: str, site_path: str, as_person: str | None = None, model: str | None = None) -> Outcome:
    """Raises BadInput or NotAllowed before anything starts, StageFailed later. A repeat is the same version."""
    order = read_order(AdoptSpec, spec_path, site_path, model, as_person)
    terms = terms_of(order, take_suites(order))
    version = resolve_version(order)
    key = digest_json({"verb": "adopt", "asked": terms.asked, "base": version})
    tags = {"mansard_author": order.author}
    with recorded(order.site, order.model_name, f"adopt {order.spec.name}", key, tags) as work:
        base = take_base(work, order, version)
        sound, data = check_base(work, base.snapshot), take_data(work, order.spec.data)
        artifact = quantize(work, base.snapshot, data, order.spec.quantize)
        candidate = Candidate(base.snapshot, artifact.snapshot, None, (base.derivation, sound, *artifact.derivations))
        return recorded_outcome(work, terms, candidate) or judge_and_register(work, terms, candidate, against=None)
