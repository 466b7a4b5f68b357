"""`mansard upgrade SPEC`: a storey is added, trained, fused, quantized, judged against what serves now, registered.

Run again it finds what was made and returns the recorded version. Imports prefect and mlflow: call
`flows.stack.use_servers` first.
"""

from prefect import flow

from flows.failure import tell_of_failure
from flows.judgement import Candidate, judge_and_register, recorded_outcome
from flows.outcome import Outcome
from mansard.digest import digest_json
from mansard.records import Derivation
from mansard.specs.whole import UpgradeSpec
from mansard.store.store import Store
from tasks.attempts import expected_attempt
from tasks.derivation import recorded
from tasks.evaluations import look_for_contamination
from tasks.expansion import expand, measure_importance, prove
from tasks.fusion import Averaged, average, fuse, measure_kept_gain
from tasks.intake import check_power, read_order, terms_of
from tasks.quantization import quantize
from tasks.registration import standing
from tasks.snapshots import check_base, resolve_version, take_base, take_data, take_suites
from tasks.training import tokenize, train


@flow(
    name="upgrade",
    flow_run_name="upgrade {spec_path}",
    persist_result=False,
    on_failure=[tell_of_failure],
    on_crashed=[tell_of_failure],
)
def upgrade(spec_path: str, site_path: str, as_person: str | None = None, model: str | None = None) -> Outcome:
    """Raises BadInput or NotAllowed before anything starts, Conflict while nothing is stable, StageFailed later."""
    order = read_order(UpgradeSpec, spec_path, site_path, model, as_person)
    spec, version = order.spec, resolve_version(order)
    against = standing(order.site, order.model_name, spec.gate.anchor_version)
    terms = terms_of(order, suites := take_suites(order))
    attempt = expected_attempt(order.site, order.model_name, suites, terms.asked)
    check_power(Store.of(order.site), terms, attempt)
    key = digest_json({"verb": "upgrade", "asked": terms.asked, "base": version})
    tags = {"mansard_author": order.author, "mansard_base_version": str(version)}
    with recorded(order.site, order.model_name, f"upgrade {spec.name}", key, tags) as work:
        base = take_base(work, order, version)
        sound, data = check_base(work, base.snapshot), take_data(work, spec.data)
        looked = look_for_contamination.submit(work, spec.gate, suites, data)
        weighed = None
        if spec.expand.positions == "importance":
            weighed = measure_importance(work, base.snapshot, data, spec.data, spec.expand.probe)
        expansion = expand(work, base.snapshot, spec.expand, weighed)
        proof = prove.submit(work, base.snapshot, expansion.snapshot, spec.prove)
        texts = tokenize(work, base.snapshot, data, spec.data)
        clean = looked.result()  # before anything is trained on what the suites ask
        trained = train(work, expansion.snapshot, texts, spec.data, spec.train)
        proven = proof.result()  # before any more work on an expansion that is not the base's function
        fused = made_model = fuse(work, expansion.snapshot, trained.snapshot)
        fusion: tuple[Derivation, ...] = (fused,)
        if spec.fuse.method == "average":
            made_model = average(work, fused.snapshot, spec.fuse)
            compared = Averaged(base.snapshot, fused.snapshot, made_model.snapshot)
            kept = measure_kept_gain(work, compared, spec, data, order.suites, suites)
            fusion = (fused, made_model, kept)
        artifact = quantize(work, made_model.snapshot, data, spec.quantize)
        placed = (expansion,) if weighed is None else (weighed, expansion)
        begun = (base.derivation, sound, clean, *(text.made for text in texts), *placed, proven)
        derivations = (*begun, trained, *fusion, *artifact.derivations)
        candidate = Candidate(made_model.snapshot, artifact.snapshot, version, derivations)
        return recorded_outcome(work, terms, candidate) or judge_and_register(work, terms, candidate, against)
