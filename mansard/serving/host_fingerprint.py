"""Compares what an engine answers to the guard prompts with what evaluation recorded for its version."""

import asyncio
import json
import logging

from mansard.errors import MansardError
from mansard.evaluation.fingerprint import Fingerprint, compare, take
from mansard.records import Registration
from mansard.release.journal import Journal
from mansard.serving.engine import Engine
from mansard.specs import Fingerprint as FingerprintSpec
from mansard.store import Store

STAGE = "fingerprint"

log = logging.getLogger(__name__)


class Fingerprints:
    """Reads the recorded ones from the store; how they were asked for stands in their lineage."""

    def __init__(self, journal: Journal, store: Store) -> None:
        self._journal = journal
        self._store = store

    async def find_change(self, model: str, version: int, engine: Engine) -> str:
        """How the answers differ; empty when they do not. MansardError when the engine does not answer."""
        registration = self._journal.registration(model, version)
        return await asyncio.to_thread(self._compare, registration, engine.endpoint)

    async def warn(self, model: str, version: int, engine: Engine) -> None:
        """For a version that was in service before: a change is said, and stops nothing (decision 10)."""
        try:
            change = await self.find_change(model, version, engine)
        except MansardError as error:
            change = f"it could not be compared: {error}"
        engine.warning = f"fingerprint: {change}" if change else ""
        if change:
            log.warning("%s version %d: fingerprint changed: %s", model, version, change)

    def _compare(self, registration: Registration, endpoint: str) -> str:
        asked = self._asked(registration)
        recorded = json.loads(self._store.read_file(registration.fingerprint, "fingerprint.json"))
        now = take(endpoint, registration.model_name, asked.prompts, asked.tokens)
        return "; ".join(compare(Fingerprint.from_json(recorded), now, asked.tolerance))

    def _asked(self, registration: Registration) -> FingerprintSpec:
        """Prompts, tokens and tolerance of the recipe that this version names."""
        recipes = [recipe for stage, recipe, _ in registration.stages if stage == STAGE]
        for record in self._store.lineage(registration.fingerprint):
            if record["recipe"] in recipes:
                return FingerprintSpec.model_validate(record["spec"]["fingerprint"])
        raise MansardError(
            f"the store has no lineage of fingerprint {registration.fingerprint[:12]}: how it was asked for is not "
            "known; evaluate the version again with: mansard gate"
        )
