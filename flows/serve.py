"""`python -m flows.serve --site FILE`: the process that serves the deployments, so that Prefect can run the flows.

Each verb is the deployment VERB/on-demand; each schedule of the site is upgrade/NAME with its cron line, signed by the
schedule's author. Flows are found by module, never by file. `run/deployments.json` is its sign of life. Stopping it
ends the flow runs that it started; what their stages made so far is not lost.
"""

import argparse
import asyncio
import json
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import Flow
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.deployments.runner import RunnerDeployment
from prefect.runner import Runner
from prefect.types.entrypoint import EntrypointType

from flows.adopt import adopt
from flows.gate import gate
from flows.release import release
from flows.rollback import rollback
from flows.upgrade import upgrade
from mansard.canonical import write_atomically
from mansard.site import Site, load_site
from tasks.policy import TAG

SIGN_OF_LIFE_SECONDS = 10.0
MAX_RUNS = 4
"""Flow runs at once in this process; a rollback must not wait for an upgrade."""


def deployments(site: Site) -> list[RunnerDeployment]:
    """What Prefect may run, as data; nothing is registered yet."""
    here = {"site_path": str(site.path)}
    verbs: list[Flow[..., Any]] = [adopt, upgrade, gate, release, rollback]
    made = [_deployment(verb, "on-demand", here) for verb in verbs]
    for each in site.schedules:
        parameters = {**here, "spec_path": str(each.spec), "as_person": each.author}
        made.append(_deployment(upgrade, each.name, parameters, cron=each.cron))
    return made


def serve(site: Site) -> None:
    """Register the deployments and run what Prefect asks for, until SIGTERM."""
    runner = Runner(name="mansard", limit=MAX_RUNS, pause_on_shutdown=True)
    names = []
    for deployment in deployments(site):
        runner.add_deployment(deployment)
        names.append(f"{deployment.flow_name}/{deployment.name}")
    threading.Thread(target=_show_life, args=(site, names), daemon=True).start()
    asyncio.run(runner.start())


def _deployment(
    verb: Flow[..., Any], name: str, parameters: dict[str, str], cron: str | None = None
) -> RunnerDeployment:
    # A scheduled run that comes while the one before still works is cancelled: they would do the same.
    alone = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)
    made = verb.to_deployment(
        name,
        parameters=parameters,
        cron=cron,
        paused=False,  # stopping this process paused it
        concurrency_limit=alone if cron else None,
        entrypoint_type=EntrypointType.MODULE_PATH,
        tags=[TAG],
    )
    assert isinstance(made, RunnerDeployment)  # a coroutine only inside an event loop
    return made


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
