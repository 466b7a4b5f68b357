"""One link of the chain of evidence behind a version: approval, verdict record, stages with recipes, data, base.

Reads the journal and the lineage records of the store. What is damaged or missing there becomes a line in `problems`;
the rest of the link is still told. A link stops where another version's evidence begins.
"""

import json
from collections.abc import Container
from typing import TYPE_CHECKING, Any

from mansard.errors import MansardError
from mansard.records import Registration
from mansard.release.events import DECISIONS, REGISTERED
from mansard.release.journal import Journal
from mansard.release.pointer import approvals_in_force

if TYPE_CHECKING:
    from mansard.store.store import Store

TAKEN = "snapshot"
"""The stage that only took the base: into the store from outside, or from its version. No recipe made anything."""


def link_of(journal: Journal, store: "Store", model: str, version: int, problems: list[str]) -> dict[str, Any]:
    """The evidence of one version as JSON. Adds to `problems`; raises BadInput for an unknown version."""
    entry = journal.evidence(model, version)
    registration = Registration.from_json(entry.body["registration"])
    entries = journal.entries(model)
    decisions = [e for e in entries if e.version == version and e.kind in DECISIONS]
    stages, data = _derivations(store, registration, _of_others(journal, registration, version), problems)
    return {
        "version": version,
        "registered": {"sequence": entry.sequence, "at": entry.at, "is_signed": entry.body["signature"] is not None},
        "author": registration.author,
        "spec": {"name": registration.spec_name, "digest": registration.spec_digest},
        "decision": _decision(decisions[-1].body, decisions[-1].kind) if decisions else None,
        "approvals": [_decision(e.body, e.kind) for e in approvals_in_force(entries, model, version)],
        "verdict": registration.verdict,
        "verdict_record": registration.verdict_record,
        "suites": _suites(store, registration, problems),
        "baseline_version": registration.baseline_version,
        "anchor_version": registration.anchor_version,
        "item_records": dict(registration.item_records),
        "artifact": registration.artifact,
        "model": registration.model,
        "stages": stages,
        "data": data,
        "base_version": registration.base_version,
        "base": _base(registration),
    }


def _base(registration: Registration) -> str:
    """What the version was built on. An adopted model is its own base."""
    return next((snapshot for stage, _, snapshot in registration.stages if stage == TAKEN), registration.model)


def _decision(body: dict[str, Any], kind: str) -> dict[str, Any]:
    approval = body.get("approval", {})
    names = ("who", "at", "reason", "artifact", "verdict_record", "baseline_version", "people_digest", "expires_at")
    return {"kind": kind, **{name: approval.get(name) for name in names}, "signature": body.get("signature")}


def _suites(store: "Store", registration: Registration, problems: list[str]) -> list[dict[str, Any]]:
    """The verdict's lines, suite by suite; empty where the record cannot be read."""
    try:
        tree = json.loads(store.read_file(registration.verdict_record, "verdict.json"))
    except (MansardError, ValueError) as error:
        problems.append(f"verdict record {registration.verdict_record[:12]}: {error}")
        return []
    suites = tree.get("suites", []) if isinstance(tree, dict) else []
    return [_suite(suite) for suite in suites if isinstance(suite, dict)]


def _suite(suite: dict[str, Any]) -> dict[str, Any]:
    """One suite of verdict.json, flat; against the baseline, where there was one."""
    against = suite.get("baseline") or {}
    effect = against.get("effect") or {}
    low, high = effect.get("low"), effect.get("high")
    return {
        **{name: suite.get(name) for name in ("suite", "role", "verdict")},
        "n": suite.get("num_items"),
        "before": (against.get("before") or {}).get("value"),
        "after": (suite.get("after") or {}).get("value"),
        "effect": effect.get("value"),
        "interval": None if low is None or high is None else [low, high],
    }


def _of_others(journal: Journal, registration: Registration, version: int) -> dict[str, str]:
    """Snapshots that another version's evidence already explains -> what they are."""
    own = {snapshot for _, snapshot in _snapshots(registration)}
    known: dict[str, str] = {}
    for entry in journal.entries(registration.model_name, kinds=(REGISTERED,)):
        if entry.version != version:
            for what, snapshot in _snapshots(Registration.from_json(entry.body["registration"])):
                known.setdefault(snapshot, f"version {entry.version}'s {what}")
    return {snapshot: what for snapshot, what in known.items() if snapshot not in own}


def _snapshots(registration: Registration) -> list[tuple[str, str]]:
    return [
        ("model", registration.model),
        ("artifact", registration.artifact),
        ("verdict record", registration.verdict_record),
        ("fingerprint", registration.fingerprint),
        *((f"records of {suite}", snapshot) for suite, snapshot in registration.item_records),
    ]


def _derivations(
    store: "Store", registration: Registration, others: dict[str, str], problems: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """(stages that made this version, its registered ones last and in their order; what they took from outside).

    Outside is a snapshot that no remembered recipe made (data, a base from a folder) or that another version explains.
    """
    own = [made for made in registration.stages if made[0] != TAKEN]
    named = {recipe: (stage, snapshot) for stage, recipe, snapshot in own}
    made: dict[str, dict[str, Any]] = {}
    outside: dict[str, str] = {}
    waiting = [*reversed([s for _, _, s in own]), *(s for _, s in _snapshots(registration))]
    listed = {snapshot for _, snapshot in named.values()}  # also another version's records, evaluated once for both
    seen = set()
    while waiting:
        snapshot = waiting.pop(0)
        if snapshot in seen or (snapshot in others and snapshot not in listed):
            continue
        seen.add(snapshot)
        for record in _records(store, snapshot, named, problems):
            made.setdefault(record["recipe"], _stage(store, snapshot, record, problems))
            for name, taken in record["inputs"].items():
                waiting.append(taken)
                outside.setdefault(taken, f"{record['stage']}: {name}")
    for recipe, (stage, snapshot) in named.items():
        if recipe not in made:
            problems.append(f"stage {stage}: no lineage record of {snapshot[:12]} in {store.root}")
            made[recipe] = {"stage": stage, "recipe": recipe, "snapshot": snapshot, "inputs": {}, "is_held": False}
    results = {stage["snapshot"] for stage in made.values()}
    base = _base(registration)
    data = [
        {"name": name, "snapshot": taken, "is": others.get(taken, "base" if taken == base else "data")}
        for taken, name in outside.items()
        if taken not in results
    ]
    order = list(named)
    stages = sorted(made.values(), key=lambda s: order.index(s["recipe"]) if s["recipe"] in named else -1)
    return stages, data


def _records(store: "Store", snapshot: str, named: Container[str], problems: list[str]) -> list[dict[str, Any]]:
    """The lineage records that count for this version: those of its own recipes, else the oldest."""
    try:
        records = store.lineage(snapshot)
    except MansardError as error:
        problems.append(str(error))
        return []
    return [r for r in records if r["recipe"] in named] or records[:1]


def _stage(store: "Store", snapshot: str, record: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    try:
        is_held = store.holds(snapshot)
    except MansardError as error:
        problems.append(str(error))
        is_held = False
    return {
        "stage": record["stage"],
        "recipe": record["recipe"],
        "snapshot": snapshot,
        "inputs": record["inputs"],
        "is_held": is_held,
        "begun_at": record.get("begun_at"),
        "seconds": record.get("seconds"),
    }
