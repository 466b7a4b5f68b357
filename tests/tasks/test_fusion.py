"""How an upgrade asks for what an average keeps, and how its report tells it."""

from pathlib import Path

import yaml

from mansard.canonical import canonical_json
from mansard.evaluation.judgement import Background as Shown
from mansard.evaluation.wording import background_rows
from mansard.spec_files import load_spec, load_suites
from mansard.specs.whole import UpgradeSpec
from mansard.store.store import Store
from tasks.evaluations import Background, provenance
from tasks.fusion import Averaged, kept_gain_asked
from tasks.snapshots import TakenData

ROOT = Path(__file__).resolve().parents[2]
PATH = ROOT / "configs/upgrade/demo.yaml"
DATA = (TakenData("code", "1" * 64, "2" * 64), TakenData("docstrings", "3" * 64, "4" * 64))


def test_an_average_is_compared_on_held_out_text_and_on_the_gates_suites_in_bits() -> None:
    tree = yaml.safe_load(PATH.read_text()) | {"fuse": {"method": "average", "weight": 0.25}}
    spec = UpgradeSpec.model_validate(tree)
    suites = load_suites(load_spec(UpgradeSpec, PATH), PATH)
    snapshots = tuple((suite.name, str(i) * 64) for i, suite in enumerate(suites, start=5))
    asked = kept_gain_asked(Averaged("a" * 64, "b" * 64, "c" * 64), spec, DATA, tuple(suites), snapshots)
    assert asked.request.inputs == {
        "base": "a" * 64, "expanded": "b" * 64, "averaged": "c" * 64,
        "data.code.held_out": "2" * 64, "data.docstrings.held_out": "4" * 64,
        "suite.code-bits": "5" * 64, "suite.docstrings-bits": "6" * 64,
    }  # fmt: skip
    assert asked.request.spec == {
        "weight": 0.25,
        "sequence_tokens": 256,
        "gains": ["data.code.held_out", "suite.code-bits"],
        "guards": ["data.docstrings.held_out", "suite.docstrings-bits"],
    }
    assert asked.data == asked.request.inputs.keys() - {"base", "expanded", "averaged"}


def test_the_report_tells_what_was_kept_and_calls_nothing_frozen(store: Store) -> None:
    bits = {"base": 2.5, "expanded": 2.0, "averaged": 2.4}
    fusion = {
        "format": 1,
        "method": "average",
        "weight": 0.5,
        "texts": {
            "suite.code-bits": {**bits, "kept_share": 0.2},
            "data.code.held_out": {**bits, "kept_share": None},
            "suite.docstrings-bits": {**bits, "loss": -0.1},
        },
        "too_short": [],
        "changed_base_tensors": ["a", "b"],
    }
    made = store.put_files({"fusion.json": canonical_json(fusion)})
    found = provenance(store, Background(1, (), (("kept-gain", "8" * 64, made),)))
    (title, rows), _ = background_rows(Shown(items={}, contamination=None, provenance=found, notes=[]))
    assert title.startswith("Fusion by average, the new blocks' weight 0.5: 2 tensors of the base changed, so nothing ")
    assert title.endswith("of this model is frozen")
    texts = {row[0]: row[1:] for row in rows[1:]}
    assert texts["suite.code-bits"] == ["2.5000", "2.0000", "2.4000", "20 %", "-"]
    assert texts["data.code.held_out"][3:] == ["nothing was gained", "-"]
    assert texts["suite.docstrings-bits"][3:] == ["-", "-0.1000"]
