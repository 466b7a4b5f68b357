"""Compares what an engine answers to the guard prompts with what evaluation recorded for its version."""

import asyncio
import json
import logging

from mansard.errors import MansardError
from mansard.release.journal import Journal
from mansard.serving.engine import Engine
from mansard.store import Store

log = logging.getLogger(__name__)


class Fingerprints:
    """Reads the recorded ones from the store."""

    def __init__(self, journal: Journal, store: Store) -> None:
        self._journal = journal
        self._store = store

    async def find_change(self, model: str, version: int, engine: Engine) -> str:
        """How the answers differ; empty when they do not. MansardError when the engine does not answer."""
        snapshot = self._journal.registration(model, version).fingerprint
        return await asyncio.to_thread(self._compare, snapshot, engine.endpoint, model)

    async def warn(self, model: str, version: int, engine: Engine) -> None:
        """For a version that was in service before: a change is said, and stops nothing (decision 10)."""
        try:
            change = await self.find_change(model, version, engine)
        except MansardError as error:
            change = f"it could not be compared: {error}"
        engine.warning = f"fingerprint: {change}" if change else ""
        if change:
            log.warning("%s version %d: fingerprint changed: %s", model, version, change)

    def _compare(self, snapshot: str, endpoint: str, served_name: str) -> str:
        from mansard.evaluation import fingerprint

        recorded = json.loads(self._store.read_file(snapshot, "fingerprint.json"))
        now = fingerprint.take(endpoint, served_name, recorded["prompts"], recorded["tokens"])
        return str(fingerprint.compare(recorded, now, recorded["tolerance"]))
