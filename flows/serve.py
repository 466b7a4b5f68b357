"""`python -m flows.serve --site FILE`: the process that runs the site's schedules when Prefect asks for them.

Each schedule of the site is the deployment upgrade-NAME/NAME with its cron line, signed by the schedule's author.
Guarantees: a deployment has no parameters, and what runs is the flow that this process built from the site file, handed
to the run's own process: whatever a deployment's entrypoint, pull steps, path or job variables say in Prefect, nobody
reads them. Verbs that speak for a person (release, rollback) are no deployments: `mansard` asks who types them.
`run/deployments.json` is its sign of life. Stopping it ends the flow runs that it started; what their stages made so
far is not lost.
"""

import argparse
import asyncio
import json
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from prefect import Flow, flow, get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.runner import Runner
from prefect.types.entrypoint import EntrypointType

from flows.upgrade import upgrade
from mansard.canonical import write_atomically
from mansard.site import Site, load_site
from mansard.site_sections import Schedule
from tasks.policy import TAG

SIGN_OF_LIFE_SECONDS = 10.0
ENTRYPOINT = "flows.serve.scheduled_upgrade"
"""What Prefect shows; nothing loads it."""
MAX_RUNS = 4
"""Flow runs at once in this process."""


def scheduled_flow(site_path: str, schedule: Schedule) -> Flow[[], None]:
    """The schedule's upgrade as a flow without parameters: site, spec and author are those of the site file."""
    spec_path, author = str(schedule.spec), schedule.author

    def scheduled_upgrade() -> None:
        upgrade(spec_path, site_path, as_person=author)

    return flow(name=f"upgrade-{schedule.name}", persist_result=False)(scheduled_upgrade)


def serve(site: Site) -> None:
    """Register the deployments and run what Prefect asks for, until SIGTERM."""
    asyncio.run(_serve(site))


async def _serve(site: Site) -> None:
    runner = Runner(name="mansard", limit=MAX_RUNS, pause_on_shutdown=True)
    await _delete_other_deployments([each.name for each in site.schedules])
    for each in site.schedules:
        await runner.aadd_flow(
            scheduled_flow(str(site.path), each),
            each.name,
            cron=each.cron,
            paused=False,  # stopping this process paused it
            # A scheduled run that comes while the one before still works is cancelled: they would do the same.
            concurrency_limit=ConcurrencyLimitConfig(
                limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW
            ),
            entrypoint_type=EntrypointType.MODULE_PATH,
            tags=[TAG],
        )
    names = [f"upgrade-{each.name}/{each.name}" for each in site.schedules]
    threading.Thread(target=_show_life, args=(site, names), daemon=True).start()
    await runner.start()


async def _delete_other_deployments(names: Sequence[str]) -> None:
    """Deployments of schedules that the site no longer has, and of verbs that earlier releases offered."""
    async with get_client() as client:
        ours = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]))
        for each in await client.read_deployments(deployment_filter=ours):
            if (each.name, each.entrypoint) not in {(name, ENTRYPOINT) for name in names}:
                await client.delete_deployment(each.id)


def _show_life(site: Site, names: Sequence[str]) -> None:
    while True:
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        record = {"format": 1, "at": at, "deployments": list(names)}
        write_atomically(site.run / "deployments.json", json.dumps(record).encode())
        time.sleep(SIGN_OF_LIFE_SECONDS)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.serve", description=__doc__)
    parser.add_argument("--site", required=True, type=Path)
    parser.add_argument("--schedules", default="", help="their digest; `mansard up` compares it")
    serve(load_site(parser.parse_args(arguments).site))
    return 0


if __name__ == "__main__":
    sys.exit(main())
