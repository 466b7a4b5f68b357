"""The rollback as a flow, for the Prefect page and automations. Needs the host; people type `mansard rollback` instead,
which loads neither prefect nor mlflow and works with everything down.
"""

from dataclasses import dataclass
from pathlib import Path

from prefect import flow

from mansard.site import load_site
from tasks.serving import roll_back


@dataclass(frozen=True, slots=True)
class RolledBack:
    """`changed` is False when there was nothing to do; `message` says what happened."""

    changed: bool
    stable: int | None
    term: int
    message: str


@flow(name="rollback", persist_result=False)
def rollback(
    site_path: str,
    who: str,
    why: str = "",
    model: str | None = None,
    from_version: int | None = None,
    to_version: int | None = None,
    hard: bool = False,
) -> RolledBack:
    """Stable goes back to previous, or a running rollout is aborted. Raises Conflict with nothing to go back to."""
    site = load_site(Path(site_path))
    body = {"who": who, "why": why, "from": from_version, "to": to_version, "hard": hard}
    answer = roll_back(site, site.model_named(model), body)
    return RolledBack(bool(answer["changed"]), answer["stable"], int(answer["term"]), str(answer["message"]))
