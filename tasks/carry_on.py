"""A branch on a base in service: its states, its training, the artifact that both make."""

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from mansard.carry_on.mending import drop_damaged
from mansard.composition.compose import composition_of
from mansard.launch import Request
from mansard.records import Derivation, SnapshotId
from mansard.release.journal import Journal
from mansard.serving.engine.card_memory import engine_memory
from mansard.serving.engine.command import ONLY_ITS_USER, variables
from mansard.site import Site
from mansard.specs.carry_on import Capture, ChooseAlpha
from mansard.specs.data import Data
from mansard.specs.whole import CustomizeSpec
from mansard.store.store import Store
from tasks import policy
from tasks.derivation import Asked, Work, derive_one, recipe
from tasks.intake import Order
from tasks.serving import engine_release
from tasks.snapshots import TakenData
from tasks.terminal import say


@dataclass(frozen=True, slots=True)
class CarryOnBase:
    """What a branch stands on: the artifact that serves, and the unquantized model behind it."""

    version: int
    model: SnapshotId
    artifact: SnapshotId


def carry_on_base(order: Order[CustomizeSpec], version: int | None) -> CarryOnBase:
    """The registered version that the spec names. One that is a carry-on itself stands on its own base's artifact."""
    assert version is not None, "the spec names a version"
    with Journal.open(order.site.journal) as journal:
        registration = journal.registration(order.model_name, version)
    found = composition_of(Store.of(order.site), registration.artifact)
    return CarryOnBase(version, registration.model, registration.artifact if found is None else found.base)


@policy.derivation
def capture(
    work: Work, base: CarryOnBase, data: tuple[TakenData, ...], spec: CustomizeSpec
) -> Derivation:
    """The base's states of the training and held-out text; a damaged cache is mended first."""
    files = {f"data.{d.name}.train": d.train for d in data} | {f"data.{d.name}.held_out": d.held_out for d in data}
    slices = {
        "data": spec.data.model_dump(mode="json"),
        "scheme": spec.capture.scheme,
        "rows": rows_of(spec.data, spec.capture),
        "serve": spec.serve.model_dump(mode="json"),
        "engine": engine_release(work.site),
        **({"taps": spec.branch.taps} if spec.branch.taps else {}),
    }
    request = Request("capture", {"artifact": base.artifact, **files}, slices)
    where: dict[str, Any] = {"nodes": [asdict(node) for node in work.site.nodes]}
    known = work.store.recall(recipe(work.site, request))
    if known is not None and (damaged := drop_damaged(work.store, known)):
        say(f"capture {known[:12]}: {', '.join(damaged)} is damaged and fetched again")
        where["salvage"] = known
    if known is None or "salvage" in where:
        where["start"] = start_of(work.site, spec.serve.tensor_parallel)
    return derive_one(work, Asked(replace(request, where=where), "capture", frozenset(files)))


@policy.derivation
def train_branch(work: Work, base: CarryOnBase, captured: SnapshotId, spec: CustomizeSpec) -> Derivation:
    """The branch and its held-out curves over alpha. A killed one goes on from its checkpoint."""
    slices = {
        "data": spec.data.model_dump(mode="json"),
        "branch": spec.branch.model_dump(mode="json", exclude=None if spec.branch.taps else {"taps"}),
        "train": spec.train.model_dump(mode="json"),
        "alphas": spec.alpha.tried,
    }
    request = Request("train-branch", {"artifact": base.artifact, "capture": captured}, slices)
    return derive_one(work, Asked(request, "train branch", frozenset({"capture"})))


@policy.derivation
def compose(work: Work, base: CarryOnBase, branch: SnapshotId, alpha: float) -> Derivation:
    """Base artifact, branch and alpha as one artifact."""
    request = Request("compose", {"artifact": base.artifact, "branch": branch}, {"alpha": alpha})
    return derive_one(work, Asked(request, "compose"))


def choose_alpha(work: Work, branch: SnapshotId, spec: CustomizeSpec) -> float:
    """The alpha that the spec's rule takes from the branch's curves; said, with the curves."""
    curves = json.loads(work.store.read_file(branch, "branch.json"))["alphas"]
    domain = frozenset(source.name for source in spec.data.sources if source.is_domain)
    for point in curves:
        bits = ", ".join(f"{name} {value:.4f}" for name, value in point["bits_per_byte"].items())
        say(f"alpha {point['alpha']:.2f}: {bits} bits per byte, held out")
    chosen = best_alpha(curves, domain, spec.alpha)
    for line in words_on(chosen, spec.alpha, spec.train.alpha):
        say(line)
    return chosen


def words_on(chosen: float, rule: ChooseAlpha, trained_alpha: float) -> list[str]:
    """What is said of the alpha that was taken; also that nobody has looked at what it does."""
    said = [f"alpha {chosen:.2f} is taken" + (" (the spec's)" if rule.fixed is not None else "")]
    if chosen > (most := max(trained_alpha, *rule.tried)):
        said.append(f"alpha {chosen:.2f} is above every alpha that was trained or tried ({most:.2f} at most)")
    return said


def best_alpha(curves: list[dict[str, Any]], domain: frozenset[str], rule: ChooseAlpha) -> float:
    """The alpha of the curves at which the domain is best while no guard is worse than at 0 by more than the rule
    allows; `fixed` where the rule names one. Where no alpha above 0 keeps the guards, 0 stays: the base."""
    if rule.fixed is not None:
        return rule.fixed
    base = next(point["bits_per_byte"] for point in curves if point["alpha"] == 0.0)
    guards = [name for name in base if name not in domain]

    def keeps_guards(point: dict[str, Any]) -> bool:
        return all(point["bits_per_byte"][name] <= base[name] + rule.guard_bits for name in guards)

    def domain_bits(point: dict[str, Any]) -> float:
        return math.fsum(point["bits_per_byte"][name] for name in domain)

    return float(min((p for p in curves if keeps_guards(p)), key=domain_bits)["alpha"])


def rows_of(mixture: Data, spec: Capture) -> dict[str, dict[str, int]]:
    """How many packed rows of each text are captured: the training tokens by the sources' weights, rounded up."""
    total = sum(source.weight for source in mixture.sources)
    return {
        source.name: {
            "train": math.ceil(spec.tokens * source.weight / total / mixture.sequence_tokens),
            "held_out": spec.held_out_rows,
        }
        for source in mixture.sources
    }


def start_of(site: Site, tensor_parallel: int) -> dict[str, Any]:
    """How a capture starts an engine of its own, where the site names no nodes; StageFailed on a card without room."""
    cores = site.engine.cores[-1] if site.engine.cores else ""
    memory = [] if site.nodes else engine_memory(site, tensor_parallel)
    return {
        "python": str(site.environments[site.engine.environment].python),
        "variables": variables(site, cores),
        "arguments": [*memory, *site.engine.arguments, ONLY_ITS_USER],
        "first_port": site.ports.engines_from,
        "timeout_seconds": site.engine.start_timeout_seconds,
        "logs": str(site.logs / "stages"),
    }
