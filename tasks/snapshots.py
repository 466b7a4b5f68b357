"""Takes what comes from outside into the store: bases, training data, suites."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mansard.digest import digest_json
from mansard.errors import BadInput, MansardError
from mansard.evaluation.suites import take_suite
from mansard.launch import Progress, Request
from mansard.models.config_keys import check_config_keys, unknown_keys
from mansard.models.families import family_of
from mansard.models.model_files import model_config
from mansard.models.quantizable import check_quantizable
from mansard.records import Derivation, SnapshotId
from mansard.release.journal import Journal
from mansard.specs.data import Data, Source, SourceText
from mansard.specs.whole import Base, QuantizedSpec, Spec
from mansard.store.snapshot import check_model_tree
from mansard.store.store import Store
from mansard.training.sources import take_text
from tasks import policy, tracking
from tasks.derivation import Asked, Work, derive_one
from tasks.intake import Order
from tasks.terminal import stage_progress

HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
"""Weights as safetensors, configuration and tokenizers; never pickles or code."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """What an upgrade builds on. `version` is None for one that came from outside."""

    snapshot: SnapshotId
    version: int | None
    derivation: Derivation


@dataclass(frozen=True, slots=True)
class TakenData:
    """One source's files in the store."""

    name: str
    train: SnapshotId
    held_out: SnapshotId


@policy.derivation
def take_base(work: Work, order: Order[QuantizedSpec], version: int | None) -> BaseModel:
    """The base in the store. `version` is what `resolve_version` found; a base from outside is checked and taken.

    An unsupported family, an unknown key of config.json, or a width that AWQ's group does not divide, is refused here,
    before any work.
    """
    begun = time.monotonic()
    if version is not None:
        with Journal.open(work.site.journal) as journal:
            snapshot, is_known = journal.registration(order.model_name, version).model, True
    else:
        tree = _folder_of(work, order.spec.base)
        check_model_tree(tree)
        known = set(work.store.snapshots())
        with stage_progress() as report:
            snapshot = work.store.snapshot(tree, _bytes_to(report))
        is_known = snapshot in known
    config = model_config(work.store, snapshot)
    if version is None:
        check_config_keys(config, order.spec.base.ignore_config_keys)
    else:
        family_of(config)
    check_quantizable(work.store.manifest(snapshot), order.spec.quantize)
    recipe = digest_json({"stage": "snapshot", "snapshot": snapshot})
    seconds = 0.0 if is_known else time.monotonic() - begun
    taken = Derivation("snapshot", snapshot, recipe, reused=is_known, seconds=seconds, log="")
    with tracking.stage_run(work.run, "snapshot", "base", recipe) as running:
        source = order.spec.base.model_dump(mode="json", exclude_none=True)
        tracking.finish_stage(running, taken, "base", tracking.Inputs({}, {}), work.site.store_uri, {"base": source})
    return BaseModel(snapshot, version, taken)


@policy.derivation
def check_base(work: Work, model: SnapshotId) -> Derivation:
    """The base is what its config says and holds finite numbers only; BadInput where it is not. Done once a base.

    Unknown keys of config.json were accepted when the base came in, by the spec's `ignore_config_keys`.
    """
    accepted = unknown_keys(model_config(work.store, model))
    spec = {"ignore_config_keys": accepted} if accepted else {}
    return derive_one(work, Asked(Request("check", {"model": model}, spec), "check"))


def resolve_version(order: Order[Spec]) -> int | None:
    """The version that the base is, resolved once; None for a base from outside."""
    wanted = order.spec.base.version
    if wanted != "stable":
        return wanted
    with Journal.open(order.site.journal) as journal:
        return journal.pointers(order.model_name).stable


@policy.derivation
def take_data(work: Work, data: Data) -> tuple[TakenData, ...]:
    """Each source's texts as snapshots of one `data.jsonl`."""

    def taken(source: Source, part: str, text: SourceText) -> SnapshotId:
        return take_text(work.store, text, work.site.data, f"data.sources.{source.name}.{part}")

    return tuple(TakenData(s.name, taken(s, "train", s.train), taken(s, "held_out", s.held_out)) for s in data.sources)


def take_suites(order: Order[Spec]) -> tuple[tuple[str, SnapshotId], ...]:
    """(suite, snapshot) pairs in the spec's order; BadInput for a suite without items."""
    store = Store.of(order.site)
    return tuple((suite.name, take_suite(store, suite, order.site.data)) for suite in order.suites)


def _folder_of(work: Work, base: Base) -> Path:
    if base.path is not None:
        return work.site.data / base.path
    assert base.hub is not None
    return _download(base.hub, str(base.revision), work.site.home / "hub")


def _download(name: str, revision: str, folder: Path) -> Path:
    """The files of a hub model at a pinned revision, fetched once."""
    from huggingface_hub import snapshot_download  # only where a spec names a hub model
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RevisionNotFoundError

    tree = folder / name / revision
    try:
        snapshot_download(name, revision=revision, allow_patterns=HUB_FILES, local_dir=tree)
    except RevisionNotFoundError as error:
        raise BadInput(f"base.revision: {name} has no revision {revision!r}; name a commit of it") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().partition("\n")[0]
        raise MansardError(f"base.hub: cannot fetch {name} at {revision}: {first}") from error
    shutil.rmtree(tree / ".cache", ignore_errors=True)  # the client's own notes are no part of the model
    return tree


def _bytes_to(report: Progress) -> Callable[[int, int], None]:
    """The store's count of bytes as a stage's progress."""

    def tell(done: int, total: int) -> None:
        report("snapshot", {"done": done, "total": total, "unit": "bytes", "text": ""})

    return tell
