"""The command that a person most likely needs next, by the journal's entries. Pure; standard library only.

A version whose newest turn was a rejection, an abort or a rollback waits for nobody: it is never offered as if it were
new. Does not cover an outage of stable (outage.py's `next_command`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mansard.records import Registration
from mansard.release.events import ABORTED, APPROVED, JUDGED, PROMOTED, REJECTED, ROLLED_BACK, Entry, Pointers
from mansard.release.pointer import approvals_in_force

APPROVABLE = ("pass", "baseline")
TURNS = (APPROVED, JUDGED, REJECTED, PROMOTED, ABORTED, ROLLED_BACK)
"""After the first two a version waits for somebody, after the others for nobody."""


def next_of_model(
    versions: Sequence[Mapping[str, Any]], entries: Sequence[Entry], pointers: Pointers, num_approvals: int
) -> str:
    """For whoever reads `status`, whose rows `versions` are."""
    if pointers.canary is not None:
        return "mansard rollback   (aborts the rollout)"
    candidates = [v for v in versions if v["baseline_version"] == pointers.stable and v["version"] != pointers.stable]
    candidates = [v for v in candidates if v["verdict"] in APPROVABLE]
    turns = {v["version"]: _newest_turn(entries, v["version"]) for v in candidates}
    waiting = [v for v in candidates if (turn := turns[v["version"]]) is None or turn.kind in (APPROVED, JUDGED)]
    if waiting:
        newest = waiting[-1]
        verb = "release" if len(newest["approvals"]) >= num_approvals else "review"
        return f"mansard {verb} {newest['version']}"
    over = [turn for turn in turns.values() if turn is not None]
    if over:
        return _after(max(over, key=lambda turn: turn.sequence))
    return "mansard upgrade SPEC" if versions else "mansard adopt SPEC"


def next_of_version(
    registration: Registration, version: int, entries: Sequence[Entry], pointers: Pointers, num_approvals: int
) -> str:
    """For whoever reads `review` of a version."""
    if version in (pointers.stable, pointers.canary):
        role = "is stable" if version == pointers.stable else "is released now"
        return f"mansard status   (version {version} {role})"
    if registration.verdict not in APPROVABLE:
        return "mend the upgrade; a version that did not pass cannot be approved"
    if registration.baseline_version != pointers.stable:
        was = "nothing" if registration.baseline_version is None else f"version {registration.baseline_version}"
        return f"mansard gate {version}   (it was judged against {was}, and stable is {pointers.stable} now)"
    if len({e.who for e in approvals_in_force(entries, registration.model_name, version)}) >= num_approvals:
        return f"mansard release {version}"
    return f'mansard approve {version} --as NAME --reason "..."'


def _newest_turn(entries: Sequence[Entry], version: int) -> Entry | None:
    turns = [e for e in entries if e.kind in TURNS and e.version == version]
    return turns[-1] if turns else None


def _after(turn: Entry) -> str:
    version = turn.version
    if turn.kind == REJECTED:
        return f"mansard upgrade SPEC   (version {version} was rejected: mansard why {version})"
    if turn.kind == PROMOTED:
        return "mansard upgrade SPEC"
    event = "was rolled back" if turn.kind == ROLLED_BACK else "was aborted"
    return f"mansard history   (version {version} {event}; it needs a new approval to be released again)"
