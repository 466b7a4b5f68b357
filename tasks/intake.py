"""What was asked for, read and checked before anything starts. Loads neither prefect nor mlflow.

`read_order` takes a second: spec, site, suites, data files, base and the author's key, so that a mistake costs no
engine start and no training. Not covered: what only a stage can see (positions beyond the depth, too few tokens).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from mansard.digest import digest_json
from mansard.errors import BadInput
from mansard.evaluation import power
from mansard.evaluation.control_tokens import check_control_tokens, known_tokens
from mansard.evaluation.power import alpha_of_attempt
from mansard.evaluation.suites import parse_items, suite_files
from mansard.models.checkpoint import check_folder
from mansard.models.quantizable import check_quantizable, check_widths
from mansard.models.vocabulary import TOKENIZER_FILE
from mansard.records import SnapshotId
from mansard.release import keys
from mansard.release.journal import Journal
from mansard.site import Site, load_site
from mansard.spec_files import load_spec, load_suites
from mansard.specs.judging import Cost, Fingerprint, Gate, Suite
from mansard.specs.whole import QuantizedSpec, Serve, Spec
from mansard.store.snapshot import check_model_tree, parse_safetensors_header
from mansard.store.store import Store
from mansard.training.sources import check_text

S = TypeVar("S", bound=Spec)
S_co = TypeVar("S_co", bound=Spec, covariant=True)


@dataclass(frozen=True, slots=True)
class Order(Generic[S_co]):
    """A checked spec with its suites, for one model name of one site. `author` signs the registration."""

    site: Site
    spec: S_co
    suites: tuple[Suite, ...]
    model_name: str
    author: str


@dataclass(frozen=True, slots=True)
class Terms:
    """How a candidate is judged, signed for and released, whatever asked for it: a spec, or an earlier version's
    evidence. `asked` is the digest of all that was asked for; `snapshots` are (suite, snapshot) pairs in the order of
    `suites`, which is the gate's; `release` is the spec's slice, word for word."""

    model_name: str
    author: str
    spec_name: str
    asked: str
    suites: tuple[Suite, ...]
    snapshots: tuple[tuple[str, SnapshotId], ...]
    serve: Serve
    gate: Gate
    fingerprint: Fingerprint
    cost: Cost
    release: dict[str, Any]


def read_order(
    kind: type[S], spec_path: str | Path, site_path: str | Path, model: str | None = None, as_person: str | None = None
) -> Order[S]:
    """Raises BadInput that names file, key, value and what would be right; NotAllowed when the author may not sign."""
    site = load_site(Path(site_path))
    spec = load_spec(kind, Path(spec_path))
    suites = load_suites(spec, Path(spec_path))
    name = site.model_named(model or (spec.name if spec.name in site.models else None))
    order = Order(site, spec, tuple(suites), name, as_person or spec.author)
    check_author(site, order.author)
    for source in spec.data.sources:
        for key, text in (("train", source.train), ("held_out", source.held_out)):
            check_text(text, site.data, f"{spec_path}: data.sources.{source.name}.{key}")
    for suite in suites:
        suite_files(suite, site.data)
    check_base(order, spec_path)
    check_items(order)
    return order


def check_author(site: Site, author: str) -> None:
    """NotAllowed unless the author has the role and their private key is on this machine."""
    keys.require_person(site, author, "author")
    keys.sign(author, site, {"record": "none"})


def check_base(order: Order[Spec], spec_path: str | Path) -> None:
    """BadInput unless the base is there: a registered version, something stable, or a folder that is a plain model;
    and one that the spec's quantization can take."""
    base, site = order.spec.base, order.site
    if base.path is not None:
        check_model_tree(site.data / base.path)
        check_folder(site.data / base.path, base.ignore_config_keys)
        if isinstance(order.spec, QuantizedSpec):
            files = sorted((site.data / base.path).glob("*.safetensors"))
            check_widths((e for f in files for e in parse_safetensors_header(f)[1]), order.spec.quantize)
    if base.version is not None:
        with Journal.open(site.journal) as journal:
            version = journal.pointers(order.model_name).stable if base.version == "stable" else base.version
            if version is None:
                raise BadInput(
                    f"{spec_path}: base.version: 'stable', but nothing of {order.model_name} is stable yet; "
                    "adopt and release a base first, or name a path"
                )
            model = journal.registration(order.model_name, version).model
        if isinstance(order.spec, QuantizedSpec):
            check_quantizable(Store.of(site).manifest(model), order.spec.quantize)


def check_items(order: Order[Spec]) -> None:
    """BadInput for suite items with another tokenizer's control tokens. A base that is still to be fetched from the hub
    has no tokenizer here yet."""
    tokenizer = _tokenizer_of(order)
    if tokenizer is None:
        return
    known = known_tokens(tokenizer)
    for suite in order.suites:
        check_control_tokens(suite.name, parse_items(suite_files(suite, order.site.data)["items.jsonl"]), known)


def _tokenizer_of(order: Order[Spec]) -> bytes | None:
    """tokenizer.json of the base; None where it has none, or is not here yet."""
    base, site = order.spec.base, order.site
    if base.path is not None:
        file = site.data / base.path / TOKENIZER_FILE
        return file.read_bytes() if file.is_file() else None
    if base.version is None:
        return None
    with Journal.open(site.journal) as journal:
        version = journal.pointers(order.model_name).stable if base.version == "stable" else base.version
        assert version is not None, "check_base has seen that something is stable"
        model = journal.registration(order.model_name, version).model
    store = Store.of(site)
    return store.read_file(model, TOKENIZER_FILE) if TOKENIZER_FILE in store.manifest(model).files else None


def check_power(store: Store, terms: Terms, attempt: int) -> None:
    """BadInput for a guard that could hardly pass at this attempt's level."""
    level = alpha_of_attempt(terms.gate.alpha, attempt)
    for role, suite, (_, snapshot) in zip(terms.gate.suites, terms.suites, terms.snapshots, strict=True):
        taken = json.loads(store.read_file(snapshot, "suite.json"))
        power.check_power(role, suite, taken["num_items"], taken["num_files"], level)


def terms_of(order: Order[Spec], suites: tuple[tuple[str, str], ...]) -> Terms:
    """How what the order makes is judged; `suites` are its suites as they were taken."""
    spec = order.spec
    return Terms(
        model_name=order.model_name,
        author=order.author,
        spec_name=spec.name,
        asked=asked_for(order, suites),
        suites=order.suites,
        snapshots=suites,
        serve=spec.serve,
        gate=spec.gate,
        fingerprint=spec.fingerprint,
        cost=spec.cost,
        release=spec.release.model_dump(mode="json"),
    )


def asked_for(order: Order[Spec], suites: tuple[tuple[str, str], ...]) -> str:
    """The spec's digest as the journal keeps it: the spec and the suites' contents, whatever the files are called."""
    return digest_json({"spec": order.spec.model_dump(mode="json"), "suites": [list(s) for s in suites]})
