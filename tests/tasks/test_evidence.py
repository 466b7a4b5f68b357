"""A version is judged again only on the items that it was judged on: a suite file edited since is one line."""

import json
from pathlib import Path

import pytest

from mansard.errors import BadInput
from mansard.evaluation.suites import suite_files
from mansard.records import Registration
from mansard.site import Site
from mansard.site_sections import Environment
from mansard.specs.judging import Cost, Gate, Suite
from mansard.specs.surgery import Quantize
from mansard.specs.whole import Serve
from mansard.store.store import Store
from tasks.evidence import Evidence, check_suites_unchanged, recorded_quantization

SUITE = Suite(format=1, name="code-bits", kind="bits_per_byte", items="code.jsonl")


@pytest.fixture
def judged(tmp_path: Path) -> tuple[Site, Evidence]:
    """A site whose version was judged on two items."""
    site = Site(tmp_path / "site.yaml", tmp_path, tmp_path, ("demo",), {"main": Environment(tmp_path, tmp_path)}, {})
    write(site, "x = 1", "y = 2")
    snapshot = Store.of(site).put_files(suite_files(SUITE, site.data))
    gate = Gate.model_validate({"suites": [{"suite": "code.yaml", "role": "guard"}]})
    return site, Evidence(gate, Serve(), (SUITE,), ((SUITE.name, snapshot),), Cost())


def write(site: Site, *texts: str) -> None:
    rows = [{"id": str(i), "file": "a.py", "text": text} for i, text in enumerate(texts)]
    (site.data / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_same_items_pass_and_so_does_a_file_that_is_gone(judged: tuple[Site, Evidence]) -> None:
    site, evidence = judged
    check_suites_unchanged(site, evidence, 7)
    (site.data / "code.jsonl").unlink()
    check_suites_unchanged(site, evidence, 7)


@pytest.mark.parametrize("texts", [("x = 1", "y = 3"), ("x = 1",), ("y = 2", "x = 1")])
def test_an_edited_file_is_refused_with_the_way_back(judged: tuple[Site, Evidence], texts: tuple[str, ...]) -> None:
    site, evidence = judged
    write(site, *texts)
    with pytest.raises(BadInput, match=r"suite code-bits: .*code\.jsonl has changed since version 7") as no:
        check_suites_unchanged(site, evidence, 7)
    assert f"mansard restore {evidence.snapshots[0][1][:12]} DIR" in str(no.value)
    assert "\n" not in str(no.value)


def registration(model: str, artifact: str) -> Registration:
    return Registration(
        model_name="demo", model=model, artifact=artifact, verdict="pass", verdict_record="e" * 64,
        fingerprint="f" * 64, item_records=(), base_version=None, baseline_version=None, anchor_version=None,
        author="ada", spec_name="demo", spec_digest="0" * 64, serve={}, release={}, stages=(),
    )  # fmt: skip


def test_how_a_version_was_quantized_is_read_from_its_lineage(judged: tuple[Site, Evidence]) -> None:
    """A record that names the preset is of before the scheme had keys of its own; a version that serves its model has
    no record."""
    site, _ = judged
    store = Store.of(site)
    model, text = store.put_files({"config.json": b"{}"}), store.put_files({"data.jsonl": b"{}"})
    settings = {"source": "docs", "samples": 8, "sample_tokens": 64, "seed": 0}
    records = {
        "a": ({"scheme": "W4A16_ASYM", "group_size": 128, **settings}, Quantize(**settings)),
        "b": ({"scheme": "awq", "group_size": 64, "symmetric": True, **settings},
              Quantize(group_size=64, symmetric=True, **settings)),
    }  # fmt: skip
    for letter, (recorded, spec) in records.items():
        artifact = store.put_files({"artifact": letter.encode()})
        lineage = {"stage": "quantize", "inputs": {"model": model, "data": text}, "spec": recorded}
        store.remember(letter * 64, artifact, lineage)
        quantization = recorded_quantization(site, registration(model, artifact))
        assert (quantization.spec, quantization.text) == (spec, text)
    quantization = recorded_quantization(site, registration(model, model))
    assert (quantization.spec, quantization.text) == (Quantize(scheme="none"), None)
