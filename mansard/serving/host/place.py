"""Where a version answers: an engine of its own, or a slot on an engine that it shares with other branches of its base.

A carry-on version takes a slot where the site says `engine.branch_slots`: then base and branches are one engine, in
memory once, and moving between branches of one base starts none. Every other version has an engine of its own.
Guarantees: the same version has the same place in every process; a branch's folder is named by its digest, so an engine
never meets another branch under a path that it knows. Does not cover: loading (residents.py).
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from mansard.canonical import canonical_json, write_atomically
from mansard.composition.compose import compose_slots, composition_of, shape_of
from mansard.records import Registration, SnapshotId
from mansard.serving.engine.command import EngineIdentity
from mansard.site import Site
from mansard.specs.whole import Serve
from mansard.store.store import Store

ALPHA_FILE = "alpha.json"
NAME_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Place:
    """`branch` is the carry-on artifact in a slot of `engine`, or None where the engine serves the version alone."""

    engine: EngineIdentity
    branch: SnapshotId | None = None

    @property
    def name(self) -> str:
        """What a request asks the engine for."""
        return self.engine.served_name if self.branch is None else self.branch[:NAME_DIGITS]


def place_of(site: Site, store: Store, registration: Registration) -> Place:
    """The place of a registered version. Makes the artifact with slots if need be (a manifest, no tensor)."""
    serve = Serve.model_validate(registration.serve, strict=False)
    slots = site.engine.branch_slots
    found = composition_of(store, registration.artifact) if slots else None
    if found is None:
        return Place(EngineIdentity(registration.artifact, registration.model_name, serve))
    shared = compose_slots(store, found.base, shape_of(store, found.branch), slots)
    return Place(EngineIdentity(shared, f"base-{found.base[:NAME_DIGITS]}", serve), registration.artifact)


def branch_folder(site: Site, store: Store, artifact: SnapshotId) -> Path:
    """The folder that an engine loads a branch from: its file, and alpha. Made once; it stays while the site does."""
    folder = site.run / "branches" / artifact
    if folder.exists():
        return folder
    found = composition_of(store, artifact)
    assert found is not None, f"artifact {artifact[:12]} is no carry-on"
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{artifact[:NAME_DIGITS]}.{os.getpid()}.{os.urandom(4).hex()}")
    store.restore(found.branch, beside)
    write_atomically(beside / ALPHA_FILE, canonical_json({"format": 1, "alpha": found.alpha}))
    try:
        beside.replace(folder)
    except OSError:  # another start was quicker; a folder is there whole or not at all
        shutil.rmtree(beside, ignore_errors=True)
        if not folder.exists():
            raise
    return folder
