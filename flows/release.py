"""`mansard release VERSION`: asks the host for a rollout, follows it and reports it.

The host walks the canary steps; this only looks on, so killing it, Prefect or MLflow changes nothing. Imports prefect
and mlflow: call `flows.stack.use_servers` first.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow

from flows.stack import urls
from mansard.site import load_site
from tasks.bound_branches import bound_branches
from tasks.canary import follow_rollout, report_rollout
from tasks.serving import begin_rollout, release_users, users_text
from tasks.terminal import say


@dataclass(frozen=True, slots=True)
class Released:
    """`state` is promoted or aborted; `reason` says why; `users` asked before it started."""

    model_name: str
    version: int
    state: str
    reason: str
    seconds: float
    users: dict[str, Any]
    urls: dict[str, str]


@flow(name="release", flow_run_name="release {version}", persist_result=False)
def release(version: int, site_path: str, who: str, model: str | None = None, why: str = "") -> Released:
    """Raises NotAllowed without an approval, Conflict when the baseline moved, a rollout runs or users are too few, and
    HostDown."""
    site = load_site(Path(site_path))
    name = site.model_named(model)
    for branch in bound_branches(site, name, version):
        say(branch.text(version))
    users = release_users(site, name, version)
    say(users_text(users))
    begin_rollout(site, name, version, who, why)
    walk = follow_rollout(site, name, version)
    report_rollout(site, name, walk, who)
    return Released(name, version, walk.state, walk.reason, walk.seconds, users, urls(site))
