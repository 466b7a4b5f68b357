"""What must hold after an upgrade that was killed and asked for again: each law gives a list of faults."""

from collections import Counter
from typing import Any

from mlflow import MlflowClient

from mansard.errors import MansardError
from mansard.records import Registration
from mansard.release.journal import Journal
from mansard.site import Site
from mansard.store.store import Store

MEASURED = "cost"
"""The one stage whose result is a measurement: another run of it is another snapshot."""


def other_ids(made: Registration, undisturbed: Registration) -> list[str]:
    """Stages, verdict record and the rest of the registration that are not what the undisturbed upgrade made."""
    told = [f"{s}: {made_of(made).get((s, r))} instead of {i}" for s, r, i in undisturbed.stages
            if s != MEASURED and made_of(made).get((s, r)) != i]  # fmt: skip
    ours, theirs = ({k: v for k, v in r.as_json().items() if k != "stages"} for r in (made, undisturbed))
    return told + [f"registration: {key}" for key in ours if ours[key] != theirs[key]]


def made_of(registration: Registration) -> dict[tuple[str, str], str]:
    return {(stage, recipe): snapshot for stage, recipe, snapshot in registration.stages}


def half_objects(site: Site) -> list[str]:
    """Damaged objects and scratch that is still there; call it after `mansard collect`, whose work the rest is."""
    store = Store.of(site)
    told = [str(d) for d in store.verify()]
    for folder, pattern in (("trees", ".*"), ("work", "*"), ("incoming", "*"), ("leases", "*")):
        told += [f"left in {folder}: {p.name}" for p in (store.root / folder).glob(pattern)]
    return told + [f"half written: {p}" for p in store.root.rglob(".*.json.*")]


def double_registrations(site: Site, versions: list[int]) -> list[str]:
    """In the journal, and in MLflow: one parent run, one child a recipe, one logged model a snapshot."""
    told = []
    with Journal.open(site.journal) as journal:
        if journal.versions("demo") != versions:
            told.append(f"the journal has versions {journal.versions('demo')} instead of {versions}")
        try:
            journal.verify()
        except MansardError as error:
            told.append(str(error))
    client = MlflowClient()
    experiment = client.get_experiment_by_name("mansard/demo")
    assert experiment is not None
    ids = [experiment.experiment_id]
    runs = list(client.search_runs(ids, max_results=1000))
    told += _doubled("parent run", [r.data.tags["mansard_upgrade"] for r in runs if "mansard_upgrade" in r.data.tags])
    children = [(r.data.tags["mlflow.parentRunId"], r.data.tags["mansard_recipe"]) for r in runs
                if "mansard_recipe" in r.data.tags]  # fmt: skip
    told += _doubled("child run", children)
    models = client.search_logged_models(ids, max_results=1000)
    told += _doubled("logged model", [m.tags["mansard_snapshot"] for m in models])
    return told + [f"run {r.info.run_name} is {r.info.status}" for r in runs if r.info.status != "FINISHED"]


def _doubled(what: str, found: list[Any]) -> list[str]:
    return [f"{what} {key}: {number}" for key, number in Counter(found).items() if number > 1]


def set_aside(name: str) -> None:
    """MLflow forgets the experiment's name: the next upgrade finds none of its runs."""
    client = MlflowClient()
    experiment = client.get_experiment_by_name("mansard/demo")
    assert experiment is not None
    client.rename_experiment(experiment.experiment_id, f"mansard/demo/{name}")
