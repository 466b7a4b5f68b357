"""Attempts at a promotion: who was tried on the same suites since the last one, so that the gate can spend its alpha.

An attempt stands in the journal before its candidate is evaluated: somebody who looks at the answers, breaks off and
mends the candidate has tried too. The same artifact under the same gate settings is one attempt, however often it is
asked for. Suites are the same that share their name, their items or their task, so a copy under a new name is no new
suite. A promotion of the model name begins anew.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mansard.digest import digest_json
from mansard.records import Registration, SnapshotId
from mansard.release.events import ATTEMPTED, EVIDENCE, PROMOTED
from mansard.release.journal import Journal
from mansard.site import Site
from mansard.specs.judging import Gate
from mansard.store.snapshot import Blob
from mansard.store.store import Store
from tasks import policy

BASELINE = "baseline"
"""The verdict that compares nothing: no try at a promotion over another version."""

SuiteSnapshots = tuple[tuple[str, SnapshotId], ...]


@dataclass(frozen=True, slots=True)
class Attempt:
    """`settings` is the digest of the gate's settings, empty for a registration from before attempts were recorded;
    `suites` are marks, see `marks_of`."""

    artifact: SnapshotId
    settings: str
    spec_digest: str
    suites: frozenset[str]

    def as_json(self) -> dict[str, Any]:
        return {
            "artifact": self.artifact,
            "settings": self.settings,
            "spec_digest": self.spec_digest,
            "suites": sorted(self.suites),
        }


@policy.record
def begin_attempt(
    site: Site,
    model_name: str,
    artifact: SnapshotId,
    gate: Gate,
    suites: SuiteSnapshots,
    spec_digest: str,
    who: str,
) -> int:
    """The number of this candidate's attempt, 1 for the first since the last promotion; recorded where it is new."""
    store = Store.of(site)
    wanted = Attempt(artifact, digest_json(gate.model_dump(mode="json")), spec_digest, marks_of(store, suites))
    with store.lock(f"attempts-{model_name}"), Journal.open(site.journal) as journal:
        tried = attempts_since_promotion(journal, model_name, wanted.suites)
        for number, known in enumerate(tried, 1):
            if known.artifact == artifact and known.settings in ("", wanted.settings):
                return number
        journal.append(model_name, ATTEMPTED, who, f"attempt {len(tried) + 1}", wanted.as_json())
    return len(tried) + 1


def expected_attempt(site: Site, model_name: str, suites: SuiteSnapshots, spec_digest: str) -> int:
    """The number that a candidate will have, before it is made: known by the spec that asks for it, or the next."""
    with Journal.open(site.journal) as journal:
        tried = attempts_since_promotion(journal, model_name, marks_of(Store.of(site), suites))
    return next((n for n, known in enumerate(tried, 1) if known.spec_digest == spec_digest), len(tried) + 1)


def attempts_since_promotion(journal: Journal, model_name: str, suites: frozenset[str]) -> list[Attempt]:
    """Those on any of the suites, in the order of their beginning."""
    found: list[Attempt] = []
    for entry in journal.entries(model_name, kinds=(ATTEMPTED, *EVIDENCE, PROMOTED)):
        if entry.kind == PROMOTED:
            found.clear()
        elif entry.kind == ATTEMPTED:
            body = entry.body
            attempt = Attempt(body["artifact"], body["settings"], body["spec_digest"], frozenset(body["suites"]))
            found.append(attempt)
        else:
            made = Registration.from_json(entry.body["registration"])
            if made.verdict != BASELINE and all(a.artifact != made.artifact for a in found):
                marks = frozenset(f"name:{name}" for name, _ in made.item_records)
                found.append(Attempt(made.artifact, "", made.spec_digest, marks))
    return [a for a in found if a.suites & suites]


def marks_of(store: Store, suites: Sequence[tuple[str, SnapshotId]]) -> frozenset[str]:
    """What suites are known by: `name:NAME`, and `items:DIGEST` or `task:TASK`."""
    marks = set()
    for name, snapshot in suites:
        marks.add(f"name:{name}")
        task = json.loads(store.read_file(snapshot, "suite.json"))["task"]
        items = store.manifest(snapshot).files["items.jsonl"]
        assert isinstance(items, Blob)
        marks.add(f"items:{items.object}" if task is None else f"task:{task}")
    return frozenset(marks)
