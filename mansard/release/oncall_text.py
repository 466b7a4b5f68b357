"""What `status`, `history` and `why` look like to a person: plain text, no colour.

`columns` is the screen's width, None where no person looks: nothing is folded then.
"""

from collections.abc import Sequence
from typing import Any

from mansard.release.events import (
    ABORTED,
    APPROVED,
    ATTEMPTED,
    CANARY_STEP,
    EMERGENCY,
    EVIDENCE,
    OUTAGES,
    PEOPLE_CHANGED,
    PROMOTED,
    REJECTED,
    ROLLED_BACK,
    ROLLOUT_STARTED,
)
from mansard.release.folded_text import fold, table
from mansard.release.outage import outage_text

SHORT = 12
"""Digits of a digest that a person sees; every command takes such a prefix."""


def status_text(status: dict[str, Any], columns: int | None = None) -> str:
    lines = [*_outage_lines(status), f"model {status['model']}, term {status['term']}"]
    standing: list[tuple[object, ...]] = []
    for name in ("stable", "canary", "previous"):
        place = status[name]
        if place is None:
            standing.append((name, None, None, None))
            continue
        share = f" at {place['weight_percent']} %" if "weight_percent" in place else ""
        since = place["since"]
        standing.append((name, f"{place['version']}{share}", since and moment(since["at"]), since and since["who"]))
    lines += [table(("pointer", "version", "since", "by"), standing, columns), ""]
    if status["last_move"] is not None:
        lines.append(f"last move: {event(status['last_move'])}")
    lines += [_split_line(status["split"]), *_journal_lines(status), *_mirror_lines(status["mirror"])]
    if "problem" in status["journal"]:
        pass  # the versions are in the journal
    elif status["versions"]:
        header = ("version", "is", "verdict", "decision", "base", "spec", "author", "registered", "artifact")
        lines += ["", table(header, [_version_cells(v) for v in status["versions"]], columns)]
    else:
        lines.append("nothing is registered yet")
    lines += ["", *(f"{name}: {url}" for name, url in status["urls"].items())]
    lines += [f"pages: {status['login']}", f"next: {status['next']}"]
    return fold("\n".join(lines), columns)


def history_text(entries: Sequence[dict[str, Any]], columns: int | None = None) -> str:
    """The reason stands below what happened where the screen has no room beside it."""
    if not entries:
        return "the journal is empty; it begins with: mansard adopt SPEC"
    rows = [(e["sequence"], moment(e["at"]), e["who"], _what(e), " ".join(str(e["why"]).split())) for e in entries]
    text = table(("entry", "when (UTC)", "who", "what", "why"), rows)
    if columns is None or max(map(len, text.splitlines())) <= columns:
        return text
    below = [(*row[:3], f"{row[3]}\n{row[4]}".rstrip()) for row in rows]
    return table(("entry", "when (UTC)", "who", "what, and why"), below, columns)


def why_text(why: dict[str, Any], columns: int | None = None) -> str:
    place = ", ".join(why["is"]) or "neither stable, canary nor previous"
    lines = [f"{why['model']} version {why['version']} is {place}"]
    if why["pointer"] is not None:
        lines.append(f"  {event(why['pointer'])}")
    for link in why["chain"]:
        lines += ["", *_link_lines(link, columns)]
    lines += ["", f"base of version {why['chain'][-1]['version']}: {why['base']}"]
    lines += [f"problem: {problem}" for problem in why["problems"]]
    return fold("\n".join(lines), columns)


def said(entry: dict[str, Any]) -> str:
    """What an entry did, in a few words."""
    version, body = entry["version"], entry.get("body", entry)
    if entry["kind"] in EVIDENCE:
        return f"{entry['kind']} version {version}: {body['registration']['verdict']}"
    if entry["kind"] == CANARY_STEP:
        return f"canary version {version} at {body['weight_percent']} %"
    if entry["kind"] == ROLLED_BACK:
        return f"rolled back from version {version} to {body['to']}"
    if entry["kind"] == ATTEMPTED:
        return f"began to evaluate artifact {body['artifact'][:SHORT]}"
    if entry["kind"] == EMERGENCY:
        return f"emergency entry about version {version}: nothing was left to move"
    if entry["kind"] in OUTAGES:
        return f"noticed: {outage_text(entry['kind'], body | {'version': version})}"
    texts = {
        APPROVED: f"approved version {version}",
        REJECTED: f"rejected version {version}",
        ROLLOUT_STARTED: f"started the rollout of version {version}",
        PROMOTED: f"promoted version {version}",
        ABORTED: f"aborted the rollout of version {version}",
        PEOPLE_CHANGED: "used another people section of the site for the first time",
    }
    return texts.get(entry["kind"], str(entry["kind"]))


def _what(entry: dict[str, Any]) -> str:
    """`said`, and how the entry came here where that was not the usual way."""
    body = entry.get("body", {})
    if body.get("emergency"):
        return f"{said(entry)} (emergency, waits for the journal)"
    facts = body.get("facts") or {}
    if facts.get("conflict"):
        return f"{said(entry)} (emergency, CONFLICT: {facts['conflict']})"
    return f"{said(entry)} (emergency)" if facts.get("emergency") else said(entry)


def event(entry: dict[str, Any]) -> str:
    reason = f": {entry['why']}" if entry["why"] else ""
    return f"{moment(entry['at'])} UTC, {entry['who']} {said(entry)}{reason}"


def moment(at: str) -> str:
    """To the second; the whole is in --json."""
    return at[:19].replace("T", " ")


def _version_cells(version: dict[str, Any]) -> tuple[object, ...]:
    return (
        version["version"],
        ", ".join(version["is"]) or None,
        version["verdict"],
        _decided(version["decision"], version["approvals"]),
        version["base_version"],
        version["spec"],
        version["author"],
        moment(version["registered_at"]),
        version["artifact"][:SHORT],
    )


def _decided(decision: dict[str, Any] | None, approvals: list[str]) -> str:
    if decision is None:
        return "waiting"
    return f"{decision['kind']} by {', '.join(approvals) or decision['who']}"


def _outage_lines(status: dict[str, Any]) -> list[str]:
    """First of all: stable has no engine, who serves, and what to type."""
    outage = status["outage"]
    if outage is None:
        return []
    since = "" if outage["since"] is None else f" since {moment(outage['since'])} UTC"
    by = "nobody serves its users (503)" if outage["served_by"] is None else (
        f"version {outage['served_by']} serves its users"
    )
    first = f"{status['model']}: version {outage['version']} (stable) is down{since}; {by}; next: {outage['next']}"
    return [first, f"  {outage['why']}", ""]


def _split_line(split: dict[str, Any]) -> str:
    if "problem" in split:
        return f"traffic split: {split['problem']}"
    shares = ", ".join(
        f"version {number} {v['weight_percent']} % ({v['endpoint'] or 'no engine'})"
        + (f" in place of version {split['stands_in_for']}" if split["stands_in_for"] and int(number) == split["stable"]
           else "")
        for number, v in sorted(split["versions"].items(), key=lambda item: int(item[0]))
    )
    agrees = "" if split["agrees"] else "; it DIFFERS from the pointers: mansard rollback or mansard up mends it"
    return f"traffic split, term {split['term']}: {shares or 'nothing is served'}{agrees}"


def _journal_lines(status: dict[str, Any]) -> list[str]:
    """What is not as it should be with the journal; usually nothing."""
    lines = []
    if "problem" in status["journal"]:
        lines += [f"journal: DOWN: {status['journal']['problem']}", "what you see is what this machine remembers"]
    for entry in status["emergency"]["waiting"]:
        lines.append(f"emergency, waits for the journal: {event(entry)}")
    for entry in status["emergency"]["conflicts"]:
        lines.append(f"emergency in CONFLICT, entry {entry['sequence']} by {entry['who']}: {entry['conflict']}")
    if "problem" in status["emergency"]:
        lines.append(f"emergency entries: {status['emergency']['problem']}")
    return lines


def _mirror_lines(mirror: dict[str, Any] | None) -> list[str]:
    if mirror is None:
        return []
    trouble = f": {mirror['trouble']}" if mirror["trouble"] else ""
    if not mirror["lag"]:
        return [f"mirror: MLflow shows {'an unknown state' if mirror['lag'] is None else 'every entry'}{trouble}"]
    return [f"mirror: MLflow is {mirror['lag']} entries behind{trouble}"]


def _link_lines(link: dict[str, Any], columns: int | None) -> list[str]:
    signed = "signed" if link["registered"]["is_signed"] else "NOT signed"
    lines = [
        f"version {link['version']}, registered {moment(link['registered']['at'])} UTC by {link['author']} ({signed}), "
        f"spec {link['spec']['name']} {link['spec']['digest'][:SHORT]}",
    ]
    if link["decision"] is None:
        lines.append("  approval: none")
    for decision in link["approvals"] or ([] if link["decision"] is None else [link["decision"]]):
        lines.append(
            f"  {decision['kind']} by {decision['who']} at {decision['at'] and moment(decision['at'])} UTC: "
            f"{decision['reason']}"
        )
    against = "" if link["baseline_version"] is None else f" against version {link['baseline_version']}"
    lines.append(f"  verdict: {link['verdict']}{against}, record {link['verdict_record'][:SHORT]}")
    lines += [f"    {_suite_line(suite)}" for suite in link["suites"]]
    lines.append(f"  artifact {link['artifact'][:SHORT]}, model {link['model'][:SHORT]}")
    if made := link.get("carry_on"):
        lines.append(
            f"  carry-on: branch {made['branch'][:SHORT]} on base artifact {made['base'][:SHORT]} at alpha "
            f"{made['alpha']:g}"
        )
    lines += [f"  {_storey_line(storey)}" for storey in link.get("storeys", [])]
    rows = [
        (s["stage"], s["recipe"][:SHORT], s["snapshot"][:SHORT] + ("" if s["is_held"] else " (not held)"), _inputs(s))
        for s in link["stages"]
    ]
    stages = table(("stage", "recipe", "snapshot", "from"), rows, None if columns is None else columns - 2)
    lines += [f"  {line}" for line in stages.splitlines()]
    lines += [f"  {d['is']}: {d['snapshot'][:SHORT]} ({d['name']})" for d in link["data"]]
    if link["base_version"] is not None:
        lines.append(f"  built on version {link['base_version']}")
    return lines


def _suite_line(suite: dict[str, Any]) -> str:
    interval = suite["interval"]
    shown = f", interval {interval[0]:+.4f} to {interval[1]:+.4f}" if interval else ""
    effect = "" if suite["effect"] is None else f", change {suite['effect']:+.4f}"
    return f"{suite['suite']} ({suite['role']}): {suite['verdict'] or 'reported'}, n {suite['n']}{effect}{shown}"


def _storey_line(storey: dict[str, Any]) -> str:
    blocks = ", ".join(str(b) for b in storey["blocks"])
    changed = ", trained together with tensors below it" if storey["has_trained_base"] else ""
    if storey.get("is_averaged_over"):
        changed += ", a later storey was averaged into the model"
    plural = "s" if len(storey["blocks"]) > 1 else ""
    return f"storey {storey['storey']}: block{plural} {blocks}, added by version {storey['added_by']}{changed}"


def _inputs(stage: dict[str, Any]) -> str:
    return ", ".join(f"{name} {snapshot[:SHORT]}" for name, snapshot in stage["inputs"].items()) or "-"
