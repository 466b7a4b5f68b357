"""From item records to a verdict record, a report and a chart."""

import io
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import matplotlib.image
import pytest

from mansard.digest import digest_bytes
from mansard.errors import StageFailed
from mansard.evaluation.html_report import html_with_cost
from mansard.evaluation.item_records import Record, bits_record, choice_record, summary_of, to_lines
from mansard.evaluation.judge_stage import judge, run
from mansard.evaluation.judgement import Background
from mansard.evaluation.report import render, with_cost
from mansard.evaluation.verdict_file import judgement_of
from mansard.specs.judging import Gate, Suite
from mansard.store.store import Store
from tests.mansard.evaluation.stage_context import stage_context

SUITES = [
    {"format": 1, "name": "code-bits", "kind": "bits_per_byte", "items": "a.jsonl"},
    {"format": 1, "name": "docs-bits", "kind": "bits_per_byte", "items": "b.jsonl"},
    {"format": 1, "name": "next-line", "kind": "multiple_choice", "items": "c.jsonl"},
]
FILES = ("verdict.json", "report.md", "report.html", "chart.png")
GATE = {
    "resamples": 500,
    "suites": [
        {"suite": "a.yaml", "role": "target"},
        {"suite": "b.yaml", "role": "guard", "margin": 0.02},
        {"suite": "c.yaml", "role": "guard", "margin": 0.05},
    ],
}


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
    snapshot = run(stage_context(store, inputs, spec))
    files = {name: store.read_file(snapshot, name) for name in FILES}
    verdict = json.loads(files["verdict.json"])
    assert verdict["files"] == {n: digest_bytes(files[n]) for n in FILES[1:]}
    return verdict, files["report.md"].decode(), files["chart.png"]


def against(store: Store, candidate: dict[str, str], anchor: dict[str, str] | None = None) -> dict[str, str]:
    baseline = artifact(store, "baseline", 0.0, 0.0, 20)
    return {**candidate, **baseline, **(anchor or artifact(store, "anchor", 0.0, 0.0, 20))}


def test_gain_without_harm_passes(store: Store) -> None:
    verdict, report, chart = judged(store, against(store, artifact(store, "candidate", -0.3, 0.001, 20)))
    assert verdict["verdict"] == "pass"
    assert [s["verdict"] for s in verdict["suites"]] == ["pass", "pass", "reported"]
    assert verdict["suites"][0]["baseline"]["effect"]["value"] < 0
    assert verdict["alpha_spent"] == pytest.approx(6 * 0.05 / (math.pi**2 * 2**2))
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
    made = {run(stage_context(store, inputs, spec)) for _ in range(2)}
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


def test_a_later_attempt_needs_more(store: Store) -> None:
    """The same answers: what the first attempt shows at 3 %, the fifth does not at 0.1 %."""
    noisy = [bits_record(f"i{n}", f"file{n % 20}", -(200 + n % 7 - 1.3 + 2 * (-1) ** n), 100) for n in range(60)]
    inputs = against(store, artifact(store, "candidate", -0.3, 0.001, 20))
    inputs["candidate.code-bits"] = take(store, "code-bits", noisy)
    verdicts = []
    for number in (1, 5):
        spec = {"gate": GATE, "suites": SUITES, "attempts": {"number": number}}
        made = run(stage_context(store, inputs, spec))
        verdicts.append(json.loads(store.read_file(made, "verdict.json"))["verdict"])
    assert verdicts == ["pass", "inconclusive"]


def test_targets_share_alpha_and_guards_do_not(store: Store) -> None:
    gate = {**GATE, "suites": [*GATE["suites"][:1], {"suite": "b.yaml", "role": "target"}, GATE["suites"][2]]}
    inputs = against(store, artifact(store, "candidate", -0.3, 0.5, 20))
    spec = {"gate": gate, "suites": SUITES, "attempts": {"number": 1}}
    verdict = json.loads(store.read_file(run(stage_context(store, inputs, spec)), "verdict.json"))
    levels = [round(s["level"] / verdict["alpha_spent"], 6) for s in verdict["suites"]]
    assert levels == [0.5, 1.0, 1.0]  # the first passed at a half, so the second was judged at the whole
    assert [s["verdict"] for s in verdict["suites"]] == ["pass", "fail", "reported"]


def test_report_tells_items_contamination_mixture_and_lineage(store: Store) -> None:
    items = [{"id": f"i{n}", "file": f"file{n % 20}", "text": f"<b>text {n}</b> | more"} for n in range(60)]
    most = {"item": "i7", "cluster": "f", "fraction": 0.5, "sources": ["code"], "passage": "thirteen words"}
    shared = {"num_items": 60, "num_short": 3, "num_shared": 1, "shared_fraction": 0.0167, "listed": [most]}
    found = {"suites": {"docs-bits": shared}}
    inputs = {
        **against(store, artifact(store, "candidate", -0.3, 0.5, 20)),
        "suite.docs-bits": store.put_files({"items.jsonl": b"".join(json.dumps(i).encode() + b"\n" for i in items)}),
        "contamination": store.put_files({"contamination.json": json.dumps(found).encode()}),
    }
    provenance = {
        "base_version": 4,
        "stages": [["train", "ab" * 32, "cd" * 32]],
        "sources": [{"name": "code", "weight": 1.0, "is_domain": True, "train": "code.jsonl"}],
    }
    spec = {"gate": GATE, "suites": SUITES, "attempts": {"number": 3}, "provenance": provenance}
    made = run(stage_context(store, inputs, spec))
    page = store.read_file(made, "report.html").decode()
    report = store.read_file(made, "report.md").decode()
    for told in (report, page):
        for words in ("Attempt 3", "code.jsonl", "built on version 4", "abababababab", "1 (1.7 %)", "thirteen words"):
            assert words in told
    assert "&lt;b>text 0&lt;/b> \\| more" in report and "&lt;b&gt;text 0&lt;/b&gt; | more" in page
    assert len(re.findall(r"^\| i\d", report, re.MULTILINE)) == 20  # code only better, docs only worse: ten of each


def test_cost_is_measured_beside_the_record_and_takes_its_place_in_the_reports(store: Store) -> None:
    inputs = against(store, artifact(store, "candidate", -0.3, 0.5, 20))
    made = run(stage_context(store, inputs, {"gate": GATE, "suites": SUITES, "attempts": {"number": 1}}))
    report, page = (store.read_file(made, f"report.{kind}").decode() for kind in ("md", "html"))
    cost = {"candidate": {"memory_mb": 5.0}, "baseline": {"memory_mb": 4.0}, "ratio": {"memory_mb": 1.25}}
    assert "| memory_mb | 4.00 | 5.00 | 1.25 |" in with_cost(report, cost)
    assert "<td>memory_mb</td><td>4.00</td><td>5.00</td><td>1.25</td>" in html_with_cost(page, cost)
    assert "mansard review" in report and "mansard review" not in with_cost(report, cost) + html_with_cost(page, cost)


def test_html_report_needs_nothing_from_elsewhere(store: Store) -> None:
    inputs = against(store, artifact(store, "candidate", -0.3, 0.001, 20))
    made = run(stage_context(store, inputs, {"gate": GATE, "suites": SUITES, "attempts": {"number": 1}}))
    page = store.read_file(made, "report.html").decode()
    assert "<script" not in page and "<link" not in page and "http" not in page and "url(" not in page
    assert page.index("Verdict: ") < page.index("code-bits") < page.index("<h2>")
    assert page.count("<svg") == 6 and page.count('src="data:image/png;base64,') == page.count("src=") == 1


@pytest.mark.parametrize("has_baseline", [True, False])
def test_the_whole_report_can_be_told_again_from_the_verdict_file(store: Store, has_baseline: bool) -> None:
    candidate = artifact(store, "candidate", -0.3, 0.5, 30)
    inputs = against(store, candidate) if has_baseline else candidate
    verdict, report, _ = judged(store, inputs)
    assert render(judgement_of(verdict)) == report
    if has_baseline:
        assert len(verdict["suites"][0]["changes"]["best"]) == 10 and "right: " not in report


def test_both_answers_stand_beside_every_changed_question(store: Store) -> None:
    questions = [
        {"id": f"q{n}", "file": f"file{n % 20}", "context": f"question {n}", "choices": ["ant", "bee", "cat", "dog"],
         "answer": 0}
        for n in range(60)
    ]  # fmt: skip
    lines = b"".join(json.dumps(q).encode() + b"\n" for q in questions)
    inputs = against(store, artifact(store, "candidate", -0.3, 0.0, 30))
    inputs["suite.next-line"] = store.put_files({"items.jsonl": lines})
    verdict, report, _ = judged(store, inputs)
    assert "| q20 | wrong: bee | right: ant | question 20 |" in report
    assert verdict["suites"][2]["changes"]["num_better"] == 10


def test_ten_upgrades_that_each_lose_half_a_margin_are_stopped() -> None:
    """Each is judged against the one before, promoted where it passes, and held against version 1 all the while."""
    gate = Gate.model_validate({"resamples": 500, "suites": [
        {"suite": "a.yaml", "role": "target"}, {"suite": "b.yaml", "role": "guard", "margin": 0.02}]})  # fmt: skip
    suites = [Suite.model_validate(s) for s in SUITES[:2]]

    def version(number: int) -> dict[str, list[Record]]:
        """Code improves and docstrings lose half a margin (0.01 bits a byte) with every version; files differ."""
        noise = [0.3 * math.log(2) * ((7 * number + n) % 3 - 1) for n in range(120)]
        shaken = [
            bits_record(f"i{n}", f"file{n % 40}", -(200 + math.log(2) * number + noise[n]), 100) for n in range(120)
        ]
        gained = [bits_record(f"i{n}", f"file{n % 40}", -(200 - 20 * number - n % 7), 100) for n in range(120)]
        return {"code-bits": gained, "docs-bits": shaken}

    def promoted(is_anchored: bool) -> int:
        stable, bare = 0, Background({}, None, {}, ())
        for number in range(1, 11):
            anchor = version(0 if is_anchored else stable)
            records = {"candidate": version(number), "baseline": version(stable), "anchor": anchor}
            if judge(gate, suites, {"number": number - stable}, records, {}, bare).verdict == "pass":
                stable = number
        return stable

    assert promoted(is_anchored=False) == 10, "one by one, each would pass"
    assert 1 <= promoted(is_anchored=True) <= 2, "the second has lost the whole margin"


def test_a_guard_that_spread_wider_than_expected_is_noted(store: Store) -> None:
    wide = [bits_record(f"i{n}", f"file{n % 20}", -(200 + n % 7 + 30 * (-1) ** (n % 20)), 100) for n in range(60)]
    inputs = against(store, artifact(store, "candidate", -0.3, 0.001, 20))
    inputs["candidate.docs-bits"] = take(store, "docs-bits", wide)
    verdict, report, _ = judged(store, inputs)
    assert "docs-bits: the answers spread wider" in report and verdict["verdict"] == "inconclusive"
    assert verdict["suites"][1]["baseline"]["spread"]["standard_deviation"] > 0.05


def test_records_of_different_engines_are_noted(store: Store) -> None:
    candidate = artifact(store, "candidate", -0.3, 0.0, 20, engine="0.33.0")
    verdict, report, _ = judged(store, against(store, candidate))
    assert "candidate.code-bits by vLLM 0.33.0" in verdict["notes"][0] and verdict["notes"][0] in report
