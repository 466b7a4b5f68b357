"""What the on-call reads and does with nothing but files: status, history, why, and a rollback with the host down.

Guarantees: standard library and PyYAML until evidence in the store is read (`why`, and the check of a rollback's
target, which load BLAKE3); damage that is found is told in the answer, not raised, where the answer is still of use.
Not covered: talking to the host (mansard/serving/host_client.py) and the form on the screen (oncall_text.py).
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mansard.errors import Conflict, Corrupt, MansardError
from mansard.release.chain import link_of
from mansard.release.events import (
    APPROVED,
    CANARY_STEP,
    DECISIONS,
    EVIDENCE,
    PEOPLE_CHANGED,
    PROMOTED,
    REGISTERED,
    ROLLED_BACK,
    ROLLOUT_STARTED,
    Entry,
    Pointers,
    utc_now,
)
from mansard.release.journal import Journal
from mansard.release.pointer import RollbackPlan, approvals_in_force, last_move, plan_rollback
from mansard.site import Site

ATTEMPTS = 5
"""So often a rollback decides anew when somebody else moved the pointer between reading and writing."""

Answers = Callable[[str, int], bool]
"""(model, version) -> whether an engine that the traffic split names answers for it now."""
WriteSplit = Callable[[str, Pointers, int], None]
"""(model, pointers, global term): bring the model's part of the split file to these pointers, which name no canary.

Repeatable: where the file says so already, nothing is written. Conflict where the file is newer than `term`.
"""


def status(site: Site, model: str) -> dict[str, Any]:
    """Pointers, rollout, traffic split and versions, as journal and files tell it."""
    if _is_new(site):
        return _status(site, model, [], Pointers(), 0)
    with Journal.open(site.journal) as journal:
        return _status(site, model, journal.entries(model), journal.pointers(model), journal.term(), journal.tip())


def history(site: Site, model: str) -> list[dict[str, Any]]:
    """The journal's entries of a model and of the site's people, in order."""
    if _is_new(site):
        return []
    with Journal.open(site.journal) as journal:
        return [_entry_json(e) for e in journal.entries() if e.model == model or e.kind == PEOPLE_CHANGED]


def why(site: Site, model: str, version: int) -> dict[str, Any]:
    """The chain of evidence from the pointer down to the first version's base. BadInput for an unknown version.

    `chain` holds this version, its base version, and so on down; `problems` what is damaged or not here.
    """
    from mansard.store import Store  # BLAKE3 is loaded only where evidence is read

    store = Store.of(site)
    with Journal.open(site.journal) as journal:
        journal.evidence(model, version)
        problems: list[str] = []
        try:
            journal.verify()
        except Corrupt as error:
            problems.append(str(error))
        entries, pointers = journal.entries(model), journal.pointers(model)
        chain: list[dict[str, Any]] = []
        following: int | None = version
        while following is not None and following not in [link["version"] for link in chain]:
            chain.append(link_of(journal, store, model, following, problems))
            following = chain[-1]["base_version"]
    return {
        "format": 1,
        "model": model,
        "version": version,
        "is": _roles(pointers, version),
        "pointer": _brief(_since(entries, version)),
        "chain": chain,
        "base": chain[-1]["model"],
        "problems": problems,
    }


def rollback_directly(
    site: Site,
    model: str,
    from_version: int | None,
    to_version: int | None,
    hard: bool,
    who: str,
    reason: str,
    answers: Answers,
    write_split: WriteSplit,
) -> dict[str, Any]:
    """Decision 10 without the host: move the pointer in the journal, then write the split. Safe to repeat.

    Also where nothing is to move, the split is brought to the pointers, because an earlier call may have been killed
    between the two. Raises Conflict (nothing to go back to), BadInput (`to_version`), Corrupt (the target is damaged)
    and MansardError (the target does not answer, and nobody is there to start it); `hard` moves in the last two cases.
    """
    begun = time.perf_counter()
    with Journal.open(site.journal) as journal:
        plan, warnings = _move(site, journal, model, from_version, to_version, hard, who, reason, answers)
        after = _write(journal, model, write_split)
    return {
        "format": 1,
        "model": model,
        "changed": plan.action != "nothing",
        "action": plan.action,
        "stable": after.stable,
        "canary": after.canary,
        "previous": after.previous,
        "term": after.term,
        "message": plan.message,
        "warnings": warnings,
        "host": "down",
        "milliseconds": round((time.perf_counter() - begun) * 1000, 3),
    }


def target_warnings(site: Site, journal: Journal, model: str, version: int, hard: bool) -> list[str]:
    """Check a version to move back to: the manifest's digest and every object's size (`mansard verify` reads bytes).
    Never approvals; only who signed and is gone is reported.

    Raises Corrupt for damaged or missing content; with `hard` that is a warning too.
    """
    from mansard.store import Store  # BLAKE3 is loaded only where evidence is read

    warnings = []
    entry = journal.evidence(model, version)
    artifact = str(entry.body["registration"]["artifact"])
    try:
        if entry.digest != entry.computed_digest():
            raise Corrupt(f"journal entry {entry.sequence} was changed")
        if not Store.of(site).holds(artifact):
            raise Corrupt(f"its artifact {artifact[:12]} is not whole in {site.store_uri}")
    except Corrupt as error:
        if not hard:
            raise Corrupt(f"{model} version {version}: {error}; --to another version, or --hard") from error
        warnings.append(f"version {version}: {error}")
    approved = [e for e in journal.entries(model, kinds=(APPROVED,)) if e.version == version]
    signers = {entry.body["registration"]["author"]: "author", **({approved[-1].who: "reviewer"} if approved else {})}
    for name, role in signers.items():
        if name not in site.people or role not in site.people[name].roles:
            warnings.append(f"version {version}: {name}, its {role}, has that role in {site.path.name} no more")
        elif site.people[name].revoked:
            why = site.people[name].revoked
            warnings.append(f"version {version}: the key of {name}, its {role}, is revoked: {why}")
    return warnings


def _move(
    site: Site,
    journal: Journal,
    model: str,
    from_version: int | None,
    to_version: int | None,
    hard: bool,
    who: str,
    reason: str,
    answers: Answers,
) -> tuple[RollbackPlan, list[str]]:
    """Decide and move the pointer; decide anew when somebody else moved it in between."""
    facts = {"host": "down", "hard": hard}
    for attempt in range(1, ATTEMPTS + 1):
        pointers = journal.pointers(model)
        plan = plan_rollback(journal.moves(model), model, pointers, utc_now(), from_version, to_version)
        warnings: list[str] = []
        try:
            if plan.action == "abort":
                journal.abort(model, _known(plan.version), who, reason or "rollback", pointers, facts)
            elif plan.action == "move":
                warnings = _check_move(site, journal, model, _known(plan.to), hard, answers)
                journal.rollback(model, _known(plan.to), who, reason or "rollback", pointers, facts)
            break
        except Conflict:
            if attempt == ATTEMPTS:
                raise
    return plan, warnings


def _write(journal: Journal, model: str, write_split: WriteSplit) -> Pointers:
    """Bring the split to the pointers; somebody newer may be writing it too."""
    for attempt in range(1, ATTEMPTS + 1):
        pointers, term = journal.pointers(model), journal.term()
        if pointers.canary is not None:
            break  # a rollout runs, and the split is its controller's
        try:
            write_split(model, pointers, term)
            break
        except Conflict:
            if attempt == ATTEMPTS:
                raise
    return pointers


def _check_move(site: Site, journal: Journal, model: str, to: int, hard: bool, answers: Answers) -> list[str]:
    warnings = target_warnings(site, journal, model, to, hard)
    if not answers(model, to):
        if not hard:
            raise MansardError(
                f"{model} version {to} has no engine that answers, and the host that would start it is down: "
                "start the host (mansard up) and try again, or move at once, answering 503 until then: --hard"
            )
        warnings.append(f"version {to} has no engine that answers; the router answers 503 until mansard up")
    return warnings


def _is_new(site: Site) -> bool:
    """Whether the site has no journal yet: looking makes none."""
    return isinstance(site.journal, Path) and not site.journal.exists()


def _known(version: int | None) -> int:
    assert version is not None, "a plan that moves or aborts names its version"
    return version


def _status(
    site: Site, model: str, entries: list[Entry], pointers: Pointers, term: int, tip: Entry | None = None
) -> dict[str, Any]:
    versions = [_version_row(entries, e, pointers) for e in entries if e.kind == REGISTERED]
    sequence = 0 if tip is None else tip.sequence
    return {
        "format": 1,
        "model": model,
        "term": term,
        "stable": _standing(entries, pointers.stable),
        "canary": _canary(entries, pointers.canary),
        "previous": _standing(entries, pointers.previous),
        "last_move": _brief(last_move(entries, model)),
        "split": _split(site, model, pointers),
        "mirror": _mirror(site, sequence),
        "versions": versions,
        "journal": {"path": str(site.journal), "entries": sequence, "tip": None if tip is None else tip.digest},
        "urls": {
            "router": f"http://127.0.0.1:{site.ports.router}",
            "prefect": f"http://127.0.0.1:{site.ports.prefect}",
            "mlflow": f"http://127.0.0.1:{site.ports.mlflow}",
        },
        "next": _next(versions, pointers, site.approval.approvals),
    }


def _version_row(entries: list[Entry], registered: Entry, pointers: Pointers) -> dict[str, Any]:
    version = registered.version or 0
    own = [e for e in entries if e.version == version]
    newest = [e for e in own if e.kind in EVIDENCE][-1].body["registration"]
    decisions = [e for e in own if e.kind in DECISIONS]
    return {
        "version": version,
        "is": _roles(pointers, version),
        "verdict": newest["verdict"],
        "baseline_version": newest["baseline_version"],
        "base_version": newest["base_version"],
        "artifact": newest["artifact"],
        "spec": newest["spec_name"],
        "author": newest["author"],
        "registered_at": registered.at,
        "decision": _brief(decisions[-1]) if decisions else None,
        "approvals": sorted({e.who for e in approvals_in_force(entries, registered.model, version)}),
    }


def _roles(pointers: Pointers, version: int) -> list[str]:
    named = {"stable": pointers.stable, "canary": pointers.canary, "previous": pointers.previous}
    return [name for name, number in named.items() if number == version]


def _since(entries: list[Entry], version: int) -> Entry | None:
    """The entry that made the version stable last, else the newest about its rollout."""
    stable = [
        e
        for e in entries
        if (e.kind == PROMOTED and e.version == version) or (e.kind == ROLLED_BACK and e.body["to"] == version)
    ]
    started = [e for e in entries if e.kind == ROLLOUT_STARTED and e.version == version]
    found = stable or started
    return found[-1] if found else None


def _standing(entries: list[Entry], version: int | None) -> dict[str, Any] | None:
    return None if version is None else {"version": version, "since": _brief(_since(entries, version))}


def _canary(entries: list[Entry], version: int | None) -> dict[str, Any] | None:
    if version is None:
        return None
    started = [e for e in entries if e.kind == ROLLOUT_STARTED][-1]
    steps = [e for e in entries if e.kind == CANARY_STEP and e.sequence > started.sequence]
    weight = steps[-1].body["weight_percent"] if steps else 0
    return {"version": version, "weight_percent": weight, "since": _brief(started)}


def _split(site: Site, model: str, pointers: Pointers) -> dict[str, Any]:
    """The split file as it stands; `agrees` says whether it serves what the pointers say."""
    try:
        tree = json.loads(site.split_file.read_bytes())
        found = tree["models"].get(model)
        told = (found["stable"], found["canary"]) if found else (None, None)
        agrees = told == (pointers.stable, pointers.canary) or (pointers.stable is None and told[1] is None)
        return {"term": tree["term"], "agrees": agrees, "versions": found["versions"] if found else {}}
    except FileNotFoundError:
        return {"term": 0, "agrees": pointers.stable is None, "versions": {}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {"term": 0, "agrees": False, "versions": {}, "problem": f"{site.split_file}: damaged: {error}"}


def _mirror(site: Site, sequence: int) -> dict[str, Any] | None:
    """How far MLflow's aliases lag behind, from the sign of life that the mirror process writes."""
    try:
        told = json.loads((site.run / "mirror.json").read_bytes())
        lag = max(sequence - int(told["sequence"]), 0)
        return {"sequence": told["sequence"], "at": told["at"], "lag": lag, "trouble": told["trouble"]}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {"sequence": None, "at": None, "lag": None, "trouble": f"{site.run / 'mirror.json'}: damaged: {error}"}


def _next(versions: list[dict[str, Any]], pointers: Pointers, num_approvals: int) -> str:
    """The command that a person most likely needs now."""
    if pointers.canary is not None:
        return "mansard rollback   (aborts the rollout)"
    waiting = [v for v in versions if v["baseline_version"] == pointers.stable and v["version"] != pointers.stable]
    waiting = [v for v in waiting if v["verdict"] in ("pass", "baseline")]
    if not waiting:
        return "mansard upgrade SPEC" if versions else "mansard adopt SPEC"
    newest = waiting[-1]
    if len(newest["approvals"]) >= num_approvals:
        return f"mansard release {newest['version']}"
    return f"mansard review {newest['version']}"


def _brief(entry: Entry | None) -> dict[str, Any] | None:
    if entry is None:
        return None
    more: dict[str, Any] = {name: entry.body[name] for name in ("to", "weight_percent") if name in entry.body}
    return {
        "sequence": entry.sequence,
        "kind": entry.kind,
        "version": entry.version,
        **more,
        "at": entry.at,
        "who": entry.who,
        "why": entry.why,
    }


def _entry_json(entry: Entry) -> dict[str, Any]:
    return {
        "format": entry.format,
        "sequence": entry.sequence,
        "model": entry.model,
        "kind": entry.kind,
        "version": entry.version,
        "at": entry.at,
        "who": entry.who,
        "why": entry.why,
        "body": entry.body,
        "previous_digest": entry.previous_digest,
        "digest": entry.digest,
    }

