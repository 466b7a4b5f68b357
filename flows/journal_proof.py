"""`mansard verify --journal`: the chain, the tables, and the signed tips of this machine and of MLflow."""

import http.client
from typing import Any

from mansard.errors import Corrupt
from mansard.release import emergency, proof
from mansard.release.journal import Journal
from mansard.release.tip import Tip, check_tips, host_key, read_tip
from mansard.site import Site
from tasks.signed_tip import published_tips


def verify_journal(site: Site) -> dict[str, Any]:
    """What was checked: entries, tips (where -> entry), and notes on what could not be. Corrupt names what is wrong."""
    tips, notes = signed_tips(site)  # before the journal is read: it may only have grown since
    with Journal.open(site.journal) as journal:
        whole = journal.whole()
    proof.check(whole)
    key = host_key(site)
    if key is None:
        if tips:
            raise Corrupt(f"{', '.join(tips)}: a signed tip, but no host key: {site.host_keys()[1]} is gone")
    else:
        check_tips(whole, tips, key)
    notes += [f"emergency entry {r.number} of {r.model} waits for its import" for r in emergency.waiting(site)]
    for entry in emergency.conflicts_of(whole.entries):
        notes.append(f"entry {entry.sequence} was an emergency in conflict: {entry.body['facts']['conflict']}")
    return {
        "entries": len(whole.entries),
        "tips": {where: tip.sequence for where, tip in tips.items()},
        "notes": notes,
    }


def signed_tips(site: Site) -> tuple[dict[str, Tip], list[str]]:
    """(where it was found -> tip, what could not be asked). Corrupt where this machine had one and it is gone."""
    tips: dict[str, Tip] = {}
    notes = []
    here = read_tip(site.tip_file)
    if here is not None:
        tips[str(site.tip_file)] = here
    elif site.host_keys()[1].exists():
        raise Corrupt(f"{site.tip_file} is gone, though the host has signed tips here: is the end of the journal too?")
    else:
        notes.append("no tip is signed on this machine yet (the host does): a cut-off end would not be seen")
    try:
        tips.update(published_tips(site))
    except (OSError, http.client.HTTPException) as error:
        notes.append(f"MLflow's copy of the tip was not compared: {error}")
    return tips, notes


def journal_text(facts: dict[str, Any]) -> str:
    told = "; ".join(f"{where}: entry {sequence}" for where, sequence in facts["tips"].items())
    lines = [f"journal: {facts['entries']} entries, the chain is whole"]
    if told:
        lines.append(f"signed tips that it holds: {told}")
    return "\n".join([*lines, *(f"note: {note}" for note in facts["notes"])])
