"""What happens when a flow run that a schedule started fails: people are told (`notify:` of the site)."""

from pathlib import Path
from typing import Any

from prefect import Flow
from prefect.client.schemas.objects import FlowRun, State

from mansard.errors import MansardError
from mansard.release.notify import notify
from mansard.site import load_site
from tasks.terminal import say


def tell_of_failure(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """For a flow's on_failure and on_crashed. Runs that a person started tell that person themselves."""
    if not flow_run.auto_scheduled:
        return
    given = flow_run.parameters
    try:
        site = load_site(Path(given["site_path"]))
    except (MansardError, KeyError) as error:
        say(f"nobody could be told of the failed {flow_run.name}: {error}")
        return
    text = f"the scheduled {flow_run.name} failed: {' '.join((state.message or str(state.name)).split())[:500]}"
    model = str(given.get("model") or ", ".join(site.models))
    trouble = notify(
        site, "upgrade_failed", model, text, spec=str(given.get("spec_path", "")), who=str(given.get("as_person") or "")
    )
    if trouble:
        say(trouble)
