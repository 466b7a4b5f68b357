"""Compares what an engine answers to the guard prompts with what evaluation recorded for its version.

Guarantees: an engine that does not answer is waited for until the deadline and not longer, and no thread waits for it;
a recorded fingerprint is read from the store once, so a bucket that hangs later ends no rollout; nor does a journal
that gives no answer: the registration is then as it was read last.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable
from typing import Any

from mansard.errors import JournalDown, MansardError
from mansard.evaluation.fingerprint import PATH, Fingerprint, answer, compare, question
from mansard.records import Registration, SnapshotId
from mansard.serving.engine import http as engine_http
from mansard.serving.engine.engine import Engine
from mansard.serving.host.journal_calls import JournalCalls
from mansard.specs.judging import Fingerprint as FingerprintSpec
from mansard.store.store import Store

STAGE = "fingerprint"
ANSWERS_SECONDS = 180.0
"""For all guard prompts. A starved machine answers late: five engines on two cores starved a good one for a minute
(2026-11-23)."""
PATIENCE_SECONDS = 2.0

log = logging.getLogger(__name__)


Recorded = tuple[Fingerprint, FingerprintSpec]
"""What was answered, and how it was asked for."""
NameOf = Callable[[str, int], str]
"""What a request asks the engine of (model, version) for."""


class Fingerprints:
    """Reads the recorded ones from the store; how they were asked for stands in their lineage."""

    def __init__(
        self, journal: JournalCalls, store: Store, session: Any, name_of: NameOf  # noqa: ANN401 - for engine_http
    ) -> None:
        self._name_of = name_of
        self._journal = journal
        self._store = store
        self._session = session
        self._registrations: dict[tuple[str, int], Registration] = {}
        self._read: dict[tuple[SnapshotId, tuple[tuple[str, str, SnapshotId], ...]], Recorded] = {}

    async def find_change(
        self, model: str, version: int, engine: Engine, deadline_seconds: float = ANSWERS_SECONDS
    ) -> str:
        """How the answers differ; empty when they do not. MansardError when the engine does not answer by then."""
        registration = await self._registration(model, version)
        name = self._name_of(model, version)
        recorded, asked = await asyncio.to_thread(self._recorded, registration)
        end = time.monotonic() + deadline_seconds
        answers = []
        for prompt in asked.prompts:
            body = question(name, prompt, asked.tokens)
            left = max(end - time.monotonic(), 0.1)
            tree = await engine_http.post_json(self._session, engine.endpoint, PATH, body, left)
            answers.append(answer(engine.endpoint, prompt, tree))
        return "; ".join(compare(recorded, Fingerprint(tuple(answers)), asked.tolerance))

    async def warn(self, model: str, version: int, engine: Engine) -> None:
        """For a version that was in service before: a change is said, and stops nothing (decision 10)."""
        try:
            change = await self.find_change(model, version, engine)
        except MansardError as error:
            change = f"it could not be compared: {error}"
        engine.warnings[self._name_of(model, version)] = f"fingerprint: {change}" if change else ""
        if change:
            log.warning("%s version %d: fingerprint: %s", model, version, change)

    async def _registration(self, model: str, version: int) -> Registration:
        key = (model, version)
        try:
            ask = self._journal.call(lambda journal: journal.registration(model, version), PATIENCE_SECONDS)
            self._registrations[key] = await ask
        except JournalDown:
            if key not in self._registrations:
                raise
        return self._registrations[key]

    def _recorded(self, registration: Registration) -> Recorded:
        key = (registration.fingerprint, tuple(registration.stages))
        if key not in self._read:
            recorded = json.loads(self._store.read_file(registration.fingerprint, "fingerprint.json"))
            self._read[key] = (Fingerprint.from_json(recorded), self._asked(registration))
        return self._read[key]

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
