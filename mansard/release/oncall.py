"""What the on-call reads with nothing but files: status, history, why.

Guarantees: standard library and PyYAML until `why` reads evidence in the store, which loads BLAKE3; damage that is
found is told in the answer, not raised, where the answer is still of use; status and history go on with what this
machine remembers while the journal's database is down. Not covered: talking to the host (serving/client.py) and
the form on the screen (oncall_text.py).
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mansard.errors import Corrupt, JournalDamaged, JournalDown
from mansard.release import emergency
from mansard.release.advice import next_of_model
from mansard.release.chain import link_of
from mansard.release.direct_rollback import known_state
from mansard.release.events import (
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
)
from mansard.release.journal import Journal
from mansard.release.outage import next_command, open_outage
from mansard.release.pointer import approvals_in_force, last_move, previous_of
from mansard.site import Site

if TYPE_CHECKING:
    from mansard.store.store import Store

_NOBODY: dict[str, int | None] = {"stable": None, "stands_in_for": None}
"""Who serves by a split file that is absent or damaged."""


def status(site: Site, model: str) -> dict[str, Any]:
    """Pointers, rollout, traffic split and versions, as journal and files tell it.

    With the journal's database down: as this machine remembers it, and `journal` holds the `problem`.
    """
    if _is_new(site):
        return _status(site, model, [], Pointers(), 0)
    try:
        with Journal.open(site.journal) as journal:
            return _status(site, model, journal.entries(model), journal.pointers(model), journal.term(), journal.tip())
    except (JournalDown, JournalDamaged) as error:
        return remembered_status(site, model, str(error))


def remembered_status(site: Site, model: str, problem: str) -> dict[str, Any]:
    """`status` without the journal. Corrupt where emergency entries were changed."""
    known, memory, _, term = known_state(site, model)
    told = _status(site, model, list(known.moves), known.pointers, max(term, known.pointers.term))
    journal = {**told["journal"], "entries": memory.sequence, "tip": memory.digest or None, "problem": problem}
    following = "mansard rollback   (works without the journal's database)"
    return {**told, "journal": journal, "next": following if told["outage"] is None else told["next"]}


def history(site: Site, model: str) -> list[dict[str, Any]]:
    """The journal's entries of a model and of the site's people, in order, and emergency entries that wait for it."""
    if _is_new(site):
        return []
    with Journal.open(site.journal) as journal:
        entries = [_entry_json(e) for e in journal.entries() if e.model == model or e.kind == PEOPLE_CHANGED]
    return entries + [_entry_json(r.as_entry()) for r in emergency.waiting(site) if r.model == model]


def remembered_history(site: Site, model: str) -> list[dict[str, Any]]:
    """The moves that this machine knows of while the journal's database is down, the waiting ones last."""
    return [_entry_json(e) for e in known_state(site, model)[0].moves]


def why(site: Site, model: str, version: int, store: "Store | None" = None) -> dict[str, Any]:
    """The chain of evidence from the pointer down to the first version's base. BadInput for an unknown version.

    `store` is the site's, where the caller has it open: one that is silent is then waited for once. `chain` holds this
    version, its base version, and so on down; `problems` what is damaged or not here.
    """
    from mansard.store.store import Store  # BLAKE3 is loaded only where evidence is read

    store = store or Store.of(site)
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
        "base": chain[-1]["base"],
        "problems": list(dict.fromkeys(problems)),
    }


def _is_new(site: Site) -> bool:
    """Whether the site has no journal yet: looking makes none."""
    return isinstance(site.journal, Path) and not site.journal.exists()


def _status(
    site: Site, model: str, entries: list[Entry], pointers: Pointers, term: int, tip: Entry | None = None
) -> dict[str, Any]:
    versions = [_version_row(entries, e, pointers) for e in entries if e.kind == REGISTERED]
    sequence = 0 if tip is None else tip.sequence
    split = _split(site, model, pointers)
    outage = _outage(entries, model, pointers, split)
    following = next_of_model(versions, entries, pointers, site.approval.approvals)
    return {
        "format": 1,
        "model": model,
        "term": term,
        "outage": outage,
        "stable": _standing(entries, pointers.stable),
        "canary": _canary(entries, pointers.canary),
        "previous": _standing(entries, pointers.previous),
        "last_move": _brief(last_move(entries, model)),
        "split": split,
        "mirror": _mirror(site, sequence),
        "versions": versions,
        "journal": {"path": str(site.journal), "entries": sequence, "tip": None if tip is None else tip.digest},
        "emergency": _emergency(site, model, entries),
        "urls": {
            "router": f"http://127.0.0.1:{site.ports.router}",
            "prefect": f"http://127.0.0.1:{site.ports.prefect}",
            "mlflow": f"http://127.0.0.1:{site.ports.mlflow}",
        },
        "next": following if outage is None else outage["next"],
    }


def _outage(
    entries: list[Entry], model: str, pointers: Pointers, split: dict[str, Any]
) -> dict[str, Any] | None:
    """Stable has no engine: since when, why, and who serves its users. By the journal; where that does not know it yet,
    by the traffic split, which does not say since when."""
    outage = open_outage(entries, model)
    to = split["stable"] if split["stands_in_for"] is not None else None
    if outage is None and (to is None or split["stands_in_for"] != pointers.stable):
        return None
    version = pointers.stable if outage is None else outage.version
    assert version is not None, "an outage is a version's"
    return {
        "version": version,
        "served_by": to if outage is None else outage.to,
        "since": None if outage is None else outage.first.at,
        "why": "the journal does not say yet" if outage is None else outage.last.why,
        "next": next_command(version, to if outage is None else outage.to, previous_of(entries, model)),
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
        roles = {name: found[name] for name in ("stable", "canary")} if found else {"stable": None, "canary": None}
        stands_in_for = found.get("stands_in_for") if found else None
        journal_roles = (roles["stable"] if stands_in_for is None else stands_in_for, roles["canary"])
        agrees = journal_roles == (pointers.stable, pointers.canary) or (
            pointers.stable is None and roles["canary"] is None
        )
        versions = found["versions"] if found else {}
        serving = {"stable": roles["stable"], "stands_in_for": stands_in_for}
        return {"term": tree["term"], "agrees": agrees, "versions": versions, **serving}
    except FileNotFoundError:
        return {"term": 0, "agrees": pointers.stable is None, "versions": {}, **_NOBODY}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{site.split_file}: damaged: {error}"
        return {"term": 0, "agrees": False, "versions": {}, **_NOBODY, "problem": problem}


def _emergency(site: Site, model: str, entries: list[Entry]) -> dict[str, Any]:
    """Moves that wait for the journal, and imported ones in conflict with it since the last promotion."""
    promoted = max((e.sequence for e in entries if e.kind == PROMOTED), default=0)
    conflicts = [e for e in emergency.conflicts_of(entries) if e.sequence > promoted]
    told = [{"sequence": e.sequence, "conflict": e.body["facts"]["conflict"], "who": e.who} for e in conflicts]
    try:
        waiting = [_brief(r.as_entry()) for r in emergency.waiting(site) if r.model == model]
        return {"waiting": waiting, "conflicts": told}
    except Corrupt as error:
        return {"waiting": [], "conflicts": told, "problem": str(error)}


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

