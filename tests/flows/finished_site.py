"""A site on which three versions had a life, made without engines and training: what every verb has to show.

Version 1 is stable again after a rollback from version 2; version 3 failed its guard and was rejected.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from mansard.canonical import canonical_json
from mansard.digest import digest_json
from mansard.evaluation.item_records import Record, bits_record, choice_record, summary_of, to_lines
from mansard.evaluation.judge_stage import run as judge
from mansard.records import Registration, SnapshotId
from mansard.release.approval import approve, reject, sign_registration
from mansard.release.journal import Journal
from mansard.release.keys import generate_key
from mansard.serving import split as splits
from mansard.site import Site, load_site
from mansard.site_sections import Environment
from mansard.store.store import Store
from tests.mansard.evaluation.stage_context import stage_context

ROOT = Path(__file__).resolve().parents[2]
SUITES = ("code-bits", "docstrings-bits", "code-next-line")
TEXT = "def read_configuration_of_every_module(folder, *, encoding='utf-8', errors='strict'):\n    '''Read it.'''"


def finished_site(folder: Path) -> Site:
    """The site, in `folder`; nothing of its stack runs."""
    shutil.copytree(ROOT / "configs", folder / "configs")
    path = folder / "configs/site/local.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["environments"]["main"]["lock"] = str(ROOT / "infra/constraints/main.txt")
    home = folder / ".mansard"
    bare = Site(path, home, folder, ("demo",), {"main": Environment(folder, folder)}, {})
    for name in ("ada", "grace"):
        generate_key(name, bare)
    path.write_text(yaml.safe_dump(tree))
    site = load_site(path)
    with Journal.open(site.journal) as journal:
        _live(site, journal)
    return site


def _live(site: Site, journal: Journal) -> None:
    first, second = _registration(site, 1, 0.0), _registration(site, 2, -0.3)
    _register(site, journal, first)
    approve(site, journal, Store.of(site), "demo", 1, "grace", "the base that our users know")
    _release(journal, 1)
    _register(site, journal, second)
    reason = "code improves by a third of a bit per byte, docstrings hold, latency is what it was: now the drill"
    approve(site, journal, Store.of(site), "demo", 2, "grace", reason)
    _release(journal, 2)
    journal.rollback("demo", 1, "grace", "drill: is the way back really one command?", journal.pointers("demo"))
    _register(site, journal, _registration(site, 3, -0.3, harm=0.5))
    reject(site, journal, "demo", 3, "grace", "answers about docstrings became worse than anybody would accept")
    split = splits.with_stable(splits.Split(), "demo", 1, "http://127.0.0.1:8100", "demo", journal.term())
    splits.write_split(site.split_file, split)


def _register(site: Site, journal: Journal, registration: Registration) -> None:
    journal.register(registration, sign_registration(site, registration))


def _release(journal: Journal, version: int) -> None:
    journal.start_rollout("demo", version, "ada", "", journal.pointers("demo"))
    for percent in (25, 100):
        journal.step("demo", version, percent, "host", "", journal.pointers("demo"))
    journal.promote("demo", version, "host", "all steps pass", journal.pointers("demo"))


def _registration(site: Site, version: int, gain: float, harm: float = 0.001) -> Registration:
    store = Store.of(site)
    data = store.put_files({"data.jsonl": b'{"text": "a"}\n'})
    model = _derived(store, "fuse", {"code.train": data}, {"config.json": b"{}", "model.txt": bytes([version])})
    artifact = _derived(store, "quantize", {"model": model}, {"model.bin": f"weights {version}".encode()})
    records = _records(store, "candidate", gain, harm, 20)
    inputs = dict(records)
    if version > 1:
        inputs |= _records(store, "baseline", 0.0, 0.0, 20) | _records(store, "anchor", 0.0, 0.0, 20)
    stages = [("fuse", digest_json("fuse"), model), ("quantize", digest_json("quantize"), artifact)]
    context = stage_context(store, {**inputs, **_background(store)}, _spec(version, stages))
    verdict_record = judge(context)
    cost = _derived(store, "cost", {"artifact": artifact}, {"cost.json": canonical_json(_cost())})
    verdict = json.loads(store.read_file(verdict_record, "verdict.json"))["verdict"]
    return Registration(
        model_name="demo",
        model=model,
        artifact=artifact,
        verdict=verdict,
        verdict_record=verdict_record,
        fingerprint=store.put_files({"fingerprint.json": b"{}"}),
        item_records=tuple((name.partition(".")[2], snapshot) for name, snapshot in records.items()),
        base_version=version - 1 or None,
        baseline_version=None if version == 1 else 1,
        anchor_version=None if version == 1 else 1,
        author="ada",
        spec_name="demo",
        spec_digest="5" * 64,
        serve={"dtype": "bfloat16"},
        release={"steps": [{"weight_percent": 25, "bake_seconds": 0.5, "min_requests": 1}]},
        stages=(*stages, *((("cost", digest_json("cost"), cost),) if version > 1 else ())),
    )


def _derived(store: Store, stage: str, inputs: dict[str, SnapshotId], files: dict[str, bytes]) -> SnapshotId:
    snapshot = store.put_files(files)
    lineage = {"format": 1, "stage": stage, "recipe": digest_json(stage), "inputs": inputs, "spec": {}, "seconds": 1.0}
    store.remember(digest_json([stage, snapshot]), snapshot, lineage)
    return snapshot


def _records(store: Store, subject: str, gain: float, harm: float, right: int) -> dict[str, SnapshotId]:
    answers = {
        "code-bits": [_bits(n, gain) for n in range(60)],
        "docstrings-bits": [_bits(n, harm) for n in range(60)],
        "code-next-line": [_choice(n, n < right) for n in range(60)],
    }
    return {
        f"{subject}.{name}": store.put_files(
            {"records.jsonl": to_lines(rows), "summary.json": json.dumps(summary_of(name, rows, "0.32.0")).encode()}
        )
        for name, rows in answers.items()
    }


def _bits(number: int, shift: float) -> Record:
    return bits_record(f"i{number}", f"library/module_{number % 20}.py", -(200 + number % 7 + 100 * shift), 100)


def _choice(number: int, is_right: bool) -> Record:
    scores = [-1.0, -9.0, -9.0, -9.0] if is_right else [-9.0, -1.0, -9.0, -9.0]
    return choice_record(f"q{number}", f"library/module_{number % 20}.py", scores, ["aa", "bb", "cc", "dd"], 0)


def _background(store: Store) -> dict[str, SnapshotId]:
    items = [{"id": f"i{n}", "file": f"library/module_{n % 20}.py", "text": f"{n} {TEXT}"} for n in range(60)]
    lines = b"".join(canonical_json(item) + b"\n" for item in items)
    shared = {"item": "i7", "fraction": 0.4, "sources": ["docstrings"], "passage": TEXT.replace("\n", " ")}
    suites = {
        name: {"num_items": 60, "num_short": 2, "num_shared": 1, "shared_fraction": 1 / 60, "listed": [shared]}
        for name in SUITES
    }
    contamination = store.put_files({"contamination.json": canonical_json({"format": 1, "suites": suites})})
    items_of = {f"suite.{name}": store.put_files({"items.jsonl": lines}) for name in SUITES[:2]}
    return {**items_of, "contamination": contamination}


def _spec(version: int, stages: list[tuple[str, str, str]]) -> dict[str, Any]:
    kinds = ("bits_per_byte", "bits_per_byte", "multiple_choice")
    sources = [
        {"name": "code", "weight": 0.8, "is_domain": True, "train": "a" * 12},
        {"name": "docstrings", "weight": 0.2, "is_domain": False, "train": "b" * 12},
    ]
    return {
        "gate": {
            "resamples": 500,
            "suites": [
                {"suite": "code.yaml", "role": "target"},
                {"suite": "docstrings.yaml", "role": "guard", "margin": 0.02},
                {"suite": "next-line.yaml", "role": "guard", "margin": 0.05},
            ],
        },
        "suites": [
            {"format": 1, "name": name, "kind": kind, "items": "a.jsonl"}
            for name, kind in zip(SUITES, kinds, strict=True)
        ],
        "attempts": {"number": max(version - 1, 1)},
        "provenance": {"base_version": version - 1 or None, "sources": sources, "stages": [list(s) for s in stages]},
    }


def _cost() -> dict[str, Any]:
    figures = {"first_token_ms_p50": 41.25, "per_token_ms_p50": 12.5, "request_ms_p50": 301.0, "memory_mb": 512.0}
    ratio = dict.fromkeys(figures, 1.04)
    return {"format": 1, "prompts": 24, "concurrency": 4, "candidate": figures, "baseline": figures, "ratio": ratio}
