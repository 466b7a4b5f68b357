"""A version is judged again only on the items that it was judged on: a suite file edited since is one line."""

import json
from pathlib import Path

import pytest

from mansard.errors import BadInput
from mansard.evaluation.suites import suite_files
from mansard.site import Site
from mansard.site_sections import Environment
from mansard.specs.judging import Cost, Gate, Suite
from mansard.specs.whole import Serve
from mansard.store.store import Store
from tasks.evidence import Evidence, check_suites_unchanged

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
