"""What a reviewer sees on a terminal says what the report says."""

import io
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from flows.review_text import BAR_CELLS, interval_bar, show
from mansard.evaluation.comparison import Change, Changes, Comparison, Estimate, Spread
from mansard.evaluation.gate import Evidence, Role, rule
from mansard.evaluation.judgement import Background, Expected, Judgement, SuiteResult
from mansard.evaluation.power import plan_guard
from mansard.records import Registration
from mansard.specs.judging import SuiteRole

FACTS: dict[str, Any] = {
    "model": "demo",
    "version": 2,
    "cost": {
        "candidate": {"memory_mb": 5.0}, "baseline": {"memory_mb": 4.0}, "ratio": {"memory_mb": 1.25},
        "prompts": 8, "concurrency": 2,
    },
    "page": "report.html",
    "chart": "chart.png",
    "decisions": [{"kind": "rejected", "who": "grace", "at": "today", "why": "answers [too] long"}],
    "next": 'mansard approve 2 --as NAME --reason "..."',
}  # fmt: skip


def result(low: float, high: float, role: Role = "guard", margin: float = 0.02) -> SuiteResult:
    point = Estimate(2.0, 1.9, 2.1)
    spread = Spread(0.03, None, 1.0)
    compared = Comparison(300, 100, point, point, Estimate((low + high) / 2, low, high), 0.01, spread)
    evidence = Evidence("docs-bits", "bits_per_byte", role, margin, 0.0, compared, compared, 0.03)
    expected = SuiteRole(suite="a.yaml", role=role, margin=margin)
    worse, better = Change("i[1]", "f", -0.1, "1.9", "2.0", "text [b]"), Change("i2", "f", 0.1, "2.0", "1.9", "")
    changes = Changes(1, 1, (worse,), (better,))
    plan = plan_guard(expected, "bits_per_byte", 300, 100, 0.03) if role == "guard" else None
    return SuiteResult(evidence, rule(evidence), point, 300, 100, Expected(0.2, 1.0, 0.05), plan, changes)


def shown(results: Iterable[SuiteResult], registration: Registration) -> str:
    suites = tuple(results)
    found = {"suites": {"docs-bits": {"num_items": 9, "num_shared": 2, "num_short": 1, "shared_fraction": 0.2}}}
    provenance = {"base_version": 4, "stages": [["train", "ab" * 32, "cd" * 32]]}
    judgement = Judgement(
        "pass", "all gating suites passed", 0.05, 0.03, {"number": 3}, suites, {}, Background({}, found, provenance, ())
    )
    screen = io.StringIO()
    show(Console(file=screen, width=120), FACTS, judgement, registration)
    return screen.getvalue()


@pytest.fixture
def registration() -> Registration:
    empty = "0" * 64
    return Registration(
        "demo", empty, empty, "pass", empty, empty, (), 1, 1, 1, "ada", "demo", empty, {}, {}, ()
    )


def test_review_tells_suites_items_cost_attempt_contamination_and_lineage(registration: Registration) -> None:
    told = shown([result(-0.01, 0.01)], registration)
    for words in (
        "version 2", "Pass: no loss of more than 0.02", "against the anchor", "expected power", "smallest change",
        "i[1]", "text [b]", "1 items got better, 1 worse", "Attempt 3", "1.25", "2 (20.0 %)", "built on version 4",
        "answers [too] long", "report.html", "mansard approve 2",
    ):  # fmt: skip
        assert words in told, words
    assert told.index("docs-bits") < told.index("i[1]") < told.index("next: ")



@given(st.floats(-1, 1), st.floats(0, 1), st.sampled_from(["guard", "target", "report"]), st.floats(0, 0.5))
def test_interval_bar_has_its_width_and_shows_estimate_inside_the_interval(
    low: float, width: float, role: Role, margin: float
) -> None:
    bar = interval_bar(result(low, low + width, role, margin))
    assert len(bar) == BAR_CELLS and bar.count("o") == 1 and set(bar) <= set(" -|:o")
    if low + width < 0:  # fewer bits: better, which is to the right of no change
        assert "|" not in bar or bar.index("|") < bar.index("o")
