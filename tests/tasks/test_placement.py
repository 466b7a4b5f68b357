"""How an upgrade asks for its expansion: importance is measured on general text, and other placements know nothing."""

from collections.abc import Callable
from pathlib import Path

from mansard.canonical import canonical_json
from mansard.evaluation.judgement import Background as Shown
from mansard.evaluation.wording import background_rows
from mansard.launch import recipe_with
from mansard.models.expand import apply, plan
from mansard.models.model_files import model_config
from mansard.records import Derivation
from mansard.spec_files import load_spec
from mansard.specs.surgery import Expand
from mansard.specs.whole import UpgradeSpec
from mansard.store.store import Store
from tasks.evaluations import Background, provenance
from tasks.expansion import expand_request, importance_asked
from tasks.snapshots import TakenData

ROOT = Path(__file__).resolve().parents[2]
DATA = (TakenData("code", "1" * 64, "2" * 64), TakenData("docstrings", "3" * 64, "4" * 64))


def test_importance_reads_the_training_text_of_general_sources_only() -> None:
    spec = load_spec(UpgradeSpec, ROOT / "configs/upgrade/demo.yaml")
    asked = importance_asked("5" * 64, DATA, spec.data, spec.expand.probe)
    assert asked.request.inputs == {"model": "5" * 64, "data.docstrings.train": "3" * 64}
    assert asked.request.spec == {"rows": 32, "tokens": 256, "seed": 0}
    assert asked.data == {"data.docstrings.train"}


def test_only_an_expansion_by_importance_names_it() -> None:
    measured = Derivation("importance", "6" * 64, "7" * 64, reused=False, seconds=1.0, log="")
    placed = expand_request("5" * 64, Expand(blocks=2, positions="importance"), measured)
    assert placed.inputs == {"model": "5" * 64, "importance": "6" * 64}
    even = expand_request("5" * 64, Expand(blocks=2), None)
    # What stood in recipes before there was a probe: they are remembered still.
    assert even.inputs == {"model": "5" * 64} and even.spec == {"blocks": 2, "positions": "even"}
    other = expand_request("5" * 64, Expand.model_validate({"blocks": 2, "probe": {"rows": 9}}), None)
    assert recipe_with(other, {}) == recipe_with(even, {})


def test_the_report_tells_what_each_block_is_worth_and_which_were_copied(
    store: Store, make_checkpoint: Callable[..., Path]
) -> None:
    base, gains = store.snapshot(make_checkpoint(depth=3)), [0.5, 0.001, 0.25]
    record = {"format": 1, "loss": 2.5, "gains": gains, "probe": {"rows": 32, "tokens": 256, "seed": 0}}
    measured = store.put_files({"importance.json": canonical_json(record)})
    wish = Expand(blocks=1, positions="importance")
    expansion = apply(store, base, plan(model_config(store, base), wish, gains))
    stages = (("importance", "8" * 64, measured), ("expand", "9" * 64, expansion))
    found = provenance(store, Background(1, (), stages))
    (title, rows), _ = background_rows(Shown(items={}, contamination=None, provenance=found, notes=[]))
    assert title == "Placement by importance (32 rows of 256 tokens of general text, loss 2.5000)"
    assert rows[1:] == [["0", "+0.5000", "no"], ["1", "+0.0010", "yes"], ["2", "+0.2500", "no"]]
