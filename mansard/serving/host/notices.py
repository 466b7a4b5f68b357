"""Which journal entries people are told of: pure, from an entry to what `notify` is called with."""

from typing import Any

from mansard.release.events import ABORTED, EVIDENCE, ROLLED_BACK, STABLE_DOWN, STABLE_UP, Entry
from mansard.release.outage import outage_text

APPROVABLE = ("pass", "baseline")


def notice_of(entry: Entry) -> dict[str, Any] | None:
    """Arguments for `notify`, or None for an entry that nobody needs to hear of at once.

    A rollback that was made without the host has told people itself, and so has the host where it noticed an outage
    before it could write it down.
    """
    facts = entry.body.get("facts") or {}
    common = {"model": entry.model, "version": entry.version, "who": entry.who, "why": entry.why}
    if facts.get("conflict"):
        text = f"{entry.model}: an emergency rollback met a journal that had moved: {facts['conflict']}"
        return {**common, "event": "emergency_conflict", "text": text, "next": "mansard history"}
    if facts.get("emergency") or facts.get("host") == "down" or facts.get("notified"):
        return None
    if entry.kind == ABORTED:
        text = f"{entry.model}: the rollout of version {entry.version} was aborted by {entry.who}: {entry.why}"
        return {**common, "event": "abort", "text": text, "next": "mansard history"}
    if entry.kind == ROLLED_BACK:
        to = entry.body["to"]
        text = f"{entry.model}: {entry.who} rolled back from version {entry.version} to {to}: {entry.why}"
        return {**common, "event": "rollback", "to": to, "text": text, "next": "mansard status"}
    if entry.kind in (STABLE_DOWN, STABLE_UP):
        event = "outage" if entry.kind == STABLE_DOWN else "outage_over"
        text = f"{entry.model}: {outage_text(entry.kind, entry.body)}: {entry.why}"
        return {**common, "event": event, "to": entry.body.get("to"), "text": text, "next": "mansard status"}
    if entry.kind in EVIDENCE and entry.body["registration"]["verdict"] in APPROVABLE:
        text = f"{entry.model} version {entry.version} waits for an approval"
        return {**common, "event": "approval_waiting", "text": text, "next": f"mansard review {entry.version}"}
    return None
