"""`make chaos`: an upgrade is killed (kill -9) at every stage and at random moments, and the same command goes again.

One upgrade asks real engines and two do all other work; each is killed again and again until its list of kills is used
up, then two commands at once bring it to its end. A kill hits the worker, the command, or both. Afterwards the
snapshots must be those of an undisturbed upgrade, no process may be left, the store must be whole, and journal and
MLflow must hold everything once. The last line is JSON with the counts; the exit status is 1 where a law was broken.
Not covered: kills of the servers, the host and the engines (their own tests), a power cut (nothing here pulls a plug).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flows import stack
from mansard.store.store import Store
from tests.chaos.ground import SPEC, Copy, Ground, make_ground
from tests.chaos.kills import ANYWHERE, Kill, left_over, plan_kills, strike

COMMAND_SECONDS = 15.0
"""What a command spends on loading libraries and on looking up what is known: kills fall into that time too."""
STATUSES = (0, 3)
"""The tiny model may pass the gate or not: the campaign asks whether it ends as it would have."""


@dataclass(slots=True)
class Tally:
    """What happened so far; every list but `kills` holds faults."""

    kills: list[Kill] = field(default_factory=list)
    missed: int = 0
    other_ids: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    half_objects: list[str] = field(default_factory=list)
    double_registrations: list[str] = field(default_factory=list)
    other_failures: list[str] = field(default_factory=list)

    def faults(self) -> list[str]:
        return [*self.other_ids, *self.orphans, *self.half_objects, *self.double_registrations, *self.other_failures]


def disturb(
    copy: Copy, kills: list[Kill], ground: Ground, usual_seconds: dict[str, float], tally: Tally
) -> list[Kill]:
    """Kill the upgrade at each moment in turn; returns the kills left over when it came to its end meanwhile.

    A stage that is done already when its turn comes is not killed any more: that kill falls anywhere.
    """
    for number, planned in enumerate(kills):
        kill = replace(planned, moment=ANYWHERE) if is_done(copy, ground, planned.moment) else planned
        with (copy.site.home / f"killed-{number}.log").open("wb") as log:
            command = subprocess.Popen(copy.command("upgrade", SPEC), cwd=copy.folder, stdout=log, stderr=log)
            is_struck = strike(kill, command, copy.site, usual_seconds)
            status = command.wait()
        tally.orphans += [f"process {pid} after {kill}" for pid in left_over(copy.site)]
        print(f"{kill.moment} {kill.whom}: {'killed' if is_struck else 'ended before'}, status {status}", flush=True)
        if is_struck:
            tally.kills.append(kill)
            continue
        tally.missed += 1
        if status not in STATUSES:
            tally.other_failures.append(f"{kill}: exit {status}, see {log.name}")
        return kills[number + 1 :]
    return []


def is_done(copy: Copy, ground: Ground, stage: str) -> bool:
    """Whether the copy remembers everything that the stage makes of this upgrade."""
    store = Store.of(copy.site)
    recipes = [recipe for name, recipe, _ in ground.undisturbed.stages if name == stage]
    return bool(recipes) and all(store.recall(recipe) is not None for recipe in recipes)


def finish_twice_at_once(copy: Copy, tally: Tally) -> int:
    """Two commands of the same spec: both end with the version, which is returned."""
    begun = [
        subprocess.Popen(copy.command("upgrade", SPEC), cwd=copy.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    told: list[dict[str, Any]] = []
    for command in begun:
        output, errors = command.communicate()
        if command.returncode in STATUSES:
            told.append(json.loads(output))
        else:
            tally.other_failures.append(f"exit {command.returncode}: {errors.decode(errors='replace')[-500:]}")
    if len({t["version"] for t in told}) > 1:
        tally.double_registrations.append(f"two commands at once made versions {[t['version'] for t in told]}")
    return int(told[0]["version"]) if told else 0


def check(copy: Copy, ground: Ground, version: int, tally: Tally) -> None:
    """Hold the laws against what is there."""
    from tests.chaos import checks  # mlflow reads the servers' addresses once, when it is imported

    tally.orphans += [f"process {pid} at the end" for pid in left_over(copy.site)]
    copy.run("collect")
    tally.half_objects += checks.half_objects(copy.site)
    tally.double_registrations += checks.double_registrations(copy.site, [1, version])
    if version:
        tally.other_ids += checks.other_ids(copy.registration(version), ground.undisturbed)
    checks.set_aside(copy.site.path.stem)


def campaign(folder: Path, seed: int) -> Tally:
    """The whole of it on a new site below `folder`."""
    begun = time.monotonic()
    tally = Tally()
    ground = make_ground(folder)
    print(f"the ground is laid after {time.monotonic() - begun:.0f} s", flush=True)
    stack.use_servers(ground.whole.site)
    from tests.chaos import checks

    checks.set_aside("undisturbed")
    usual_seconds = usual_seconds_of(ground)
    for number, kills in enumerate(plan_kills(seed)):
        is_asking = any(kill.moment == "evaluate" for kill in kills)
        rest, attempt = kills, 0
        while rest:
            copy = ground.copy(f"upgrade-{number}-{attempt}", is_answered=not is_asking)
            rest = disturb(copy, rest, ground, usual_seconds, tally)
            check(copy, ground, finish_twice_at_once(copy, tally), tally)
            attempt += 1
            seconds = time.monotonic() - begun
            print(f"after {seconds:.0f} s: {len(tally.kills)} kills, faults: {tally.faults()}", flush=True)
    return tally


def usual_seconds_of(ground: Ground) -> dict[str, float]:
    """How long each stage's process lived in the undisturbed upgrade: from its request to what it left behind."""
    site, found = ground.whole.site, {}
    for stage, recipe, snapshot in ground.undisturbed.stages:
        for made in Store.of(site).lineage(snapshot):
            if made["recipe"] == recipe and "log" in made:
                begun = Path(made["log"]).with_suffix(".request.json").stat().st_mtime
                found[stage] = (site.store / "recipes" / f"{recipe}.json").stat().st_mtime - begun
    return {**found, ANYWHERE: COMMAND_SECONDS + found["train"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=2026)
    seed = parser.parse_args().seed
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mansard-chaos-") as scratch:
        folder = Path(scratch)
        try:
            tally = campaign(folder, seed)
        finally:
            site = folder / "configs/site/test.yaml"
            if site.exists():
                subprocess.run([sys.executable, "-m", "flows.cli", "down", "--site", str(site)], check=True)
    for fault in tally.faults():
        print(f"fault: {fault}")
    line = {
        "kills": len(tally.kills),
        "seed": seed,
        "whom": Counter(k.whom for k in tally.kills),
        "moments": Counter(k.moment for k in tally.kills),
        "missed": tally.missed,
        "other_ids": len(tally.other_ids),
        "orphans": len(tally.orphans),
        "half_objects": len(tally.half_objects),
        "double_registrations": len(tally.double_registrations),
        "other_failures": len(tally.other_failures),
        "seconds": round(time.monotonic() - begun),
    }
    print(json.dumps(line))
    return 1 if tally.faults() or len(tally.kills) < 30 else 0


if __name__ == "__main__":
    sys.exit(main())
