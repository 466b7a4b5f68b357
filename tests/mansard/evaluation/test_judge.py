"""From item records to a verdict record, a report and a chart."""

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from mansard.digest import digest_bytes
from mansard.errors import StageFailed
from mansard.evaluation.item_records import Record, bits_record, choice_record, summary_of, to_lines
from mansard.evaluation.judge_stage import run
from mansard.store import Store

SUITES = [
    {"format": 1, "name": "code-bits", "kind": "bits_per_byte", "items": "a.jsonl"},
    {"format": 1, "name": "docs-bits", "kind": "bits_per_byte", "items": "b.jsonl"},
    {"format": 1, "name": "next-line", "kind": "multiple_choice", "items": "c.jsonl"},
]
GATE = {
    "resamples": 500,
    "suites": [
        {"suite": "a.yaml", "role": "target"},
        {"suite": "b.yaml", "role": "guard", "margin": 0.02},
        {"suite": "c.yaml", "role": "guard", "margin": 0.05},
    ],
}


@dataclass
class Context:
    """What the worker hands to a stage."""

    store: Store
    inputs: Mapping[str, str]
    spec: Mapping[str, Any]
    recipe: str = "r"
    where: Mapping[str, Any] = field(default_factory=dict)
    work: Path = Path("nowhere")
    progress: Callable[..., None] = lambda *_, **__: None


def bits(shift: float) -> list[Record]:
    return [bits_record(f"i{n}", f"file{n % 20}", -(200 + n % 7 + 100 * shift), 100) for n in range(60)]


def choices(right: int) -> list[Record]:
    """60 questions whose answer is choice 0; it is chosen in the first `right` of them."""
    chosen, texts = {True: [-1.0, -9.0, -9.0, -9.0], False: [-9.0, -1.0, -9.0, -9.0]}, ["aa", "bb", "cc", "dd"]
    return [choice_record(f"q{n}", f"file{n % 20}", chosen[n < right], texts, 0) for n in range(60)]


def take(store: Store, name: str, records: list[Record], engine: str = "0.32.0") -> str:
    summary = json.dumps(summary_of(name, records, engine)).encode()
    return store.put_files({"records.jsonl": to_lines(records), "summary.json": summary})


def artifact(store: Store, who: str, code: float, docs: float, right: int, engine: str = "0.32.0") -> dict[str, str]:
    made = {"code-bits": bits(code), "docs-bits": bits(docs), "next-line": choices(right)}
    return {f"{who}.{name}": take(store, name, records, engine) for name, records in made.items()}


def judged(store: Store, inputs: Mapping[str, str]) -> tuple[dict[str, Any], str, bytes]:
    spec = {"gate": GATE, "suites": SUITES, "attempts": {"number": 2}}
    snapshot = run(Context(store, inputs, spec))  # type: ignore[arg-type]
    files = {name: store.read_file(snapshot, name) for name in ("verdict.json", "report.md", "chart.png")}
    verdict = json.loads(files["verdict.json"])
    assert verdict["files"] == {n: digest_bytes(files[n]) for n in ("report.md", "chart.png")}
    return verdict, files["report.md"].decode(), files["chart.png"]


def against(store: Store, candidate: dict[str, str], anchor: dict[str, str] | None = None) -> dict[str, str]:
    baseline = artifact(store, "baseline", 0.0, 0.0, 20)
    return {**candidate, **baseline, **(anchor or artifact(store, "anchor", 0.0, 0.0, 20))}


def test_gain_without_harm_passes(store: Store) -> None:
    verdict, report, chart = judged(store, against(store, artifact(store, "candidate", -0.3, 0.001, 20)))
    assert verdict["verdict"] == "pass"
    assert [s["verdict"] for s in verdict["suites"]] == ["pass", "pass", "reported"]
    assert verdict["suites"][0]["baseline"]["effect"]["value"] < 0 and verdict["alpha_spent"] == 0.05
    assert report.startswith("# Verdict: pass\n") and "Attempt 2" in report
    assert matplotlib.image.imread(io.BytesIO(chart)).shape[1] > 1000


def test_report_names_every_suite_with_figures_and_reason(store: Store) -> None:
    verdict, report, _ = judged(store, against(store, artifact(store, "candidate", -0.3, 0.001, 20)))
    for suite in verdict["suites"]:
        assert f"## {suite['suite']}" in report and suite["reason"].split(": ")[-1] in report
    assert "| code-bits | target | 60 (20) |" in report and "above chance" in report


def test_harm_beyond_the_margin_fails_and_names_the_suite(store: Store) -> None:
    verdict, report, _ = judged(store, against(store, artifact(store, "candidate", -0.3, 0.5, 20)))
    assert verdict["verdict"] == "fail" and verdict["reason"] == "failed: docs-bits"
    assert "60 worse" in report


def test_ten_small_losses_are_caught_by_the_anchor(store: Store) -> None:
    candidate = artifact(store, "candidate", -0.3, 0.01, 20)
    anchor = artifact(store, "anchor", 0.0, -0.09, 20)
    assert judged(store, against(store, candidate, anchor))[0]["verdict"] == "fail"


def test_first_version_is_the_baseline(store: Store) -> None:
    verdict, report, _ = judged(store, artifact(store, "candidate", 0.0, 0.0, 20))
    assert verdict["verdict"] == "baseline" and "no version in service" in report
    assert all(s["baseline"] is None and s["after"]["low"] is not None for s in verdict["suites"])


def test_same_inputs_give_the_same_bytes(store: Store) -> None:
    inputs = against(store, artifact(store, "candidate", -0.3, 0.001, 40))
    spec = {"gate": GATE, "suites": SUITES, "attempts": {"number": 1}}
    made = {run(Context(store, inputs, spec)) for _ in range(2)}  # type: ignore[arg-type]
    assert len(made) == 1


def test_other_items_than_the_baseline_answered_are_refused(store: Store) -> None:
    inputs = against(store, artifact(store, "candidate", -0.3, 0.0, 20))
    inputs["candidate.code-bits"] = take(store, "code-bits", list(reversed(bits(0.0))))
    with pytest.raises(StageFailed, match="code-bits: the baseline answered 'i0' where the candidate answered 'i59'"):
        judged(store, inputs)


def test_missing_baseline_records_of_one_suite_are_no_pass(store: Store) -> None:
    inputs = against(store, artifact(store, "candidate", -0.3, 0.0, 20))
    del inputs["baseline.docs-bits"]
    assert judged(store, inputs)[0]["verdict"] == "inconclusive"


def test_missing_anchor_records_are_no_pass(store: Store) -> None:
    inputs = against(store, artifact(store, "candidate", -0.3, 0.0, 20))
    inputs = {k: v for k, v in inputs.items() if not k.startswith("anchor.")}
    assert judged(store, inputs)[0]["verdict"] == "inconclusive"


def test_records_of_different_engines_are_noted(store: Store) -> None:
    candidate = artifact(store, "candidate", -0.3, 0.0, 20, engine="0.33.0")
    verdict, report, _ = judged(store, against(store, candidate))
    assert "candidate.code-bits by vLLM 0.33.0" in verdict["notes"][0] and verdict["notes"][0] in report
