"""A stage run in the test's own process."""

from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from mansard.store.store import Store
from mansard.worker import Channel, StageContext


def stage_context(store: Store, inputs: Mapping[str, str], spec: Mapping[str, Any] | None = None) -> StageContext:
    """What the worker hands to a stage that needs no folder."""
    return StageContext(store, "a" * 64, inputs, spec or {}, {}, Path("nowhere"), Channel(StringIO()))
