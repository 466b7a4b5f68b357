"""MLflow as the index people look at: one parent run per upgrade, one child run per stage, a logged model per snapshot.

Everything is found again by its tags, so a repeat adds nothing: the parent by its upgrade, a child by its recipe, a
logged model by its snapshot. Weights never travel: a logged model holds a snapshot id and the URI of the store. The
server is the one that MLFLOW_TRACKING_URI names. Not covered: registered versions and aliases (registry.py).
"""

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import mlflow
from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModel,
    LoggedModelInput,
    LoggedModelOutput,
    Metric,
    Param,
    Run,
    RunTag,
)
from mlflow.exceptions import MlflowException

from mansard.errors import MansardError
from mansard.records import Derivation, SnapshotId

FLUSH_SECONDS = 2.0
"""Metrics of a running stage are sent at most this often; a call takes some 10 ms."""
MAX_METRICS = 1000
"""MLflow's limit for one batch."""
DATASET_DIGEST_LENGTH = 36
"""MLflow's column for a data set's digest; the whole snapshot id stands in its source."""


@dataclass(frozen=True, slots=True)
class UpgradeRun:
    """The parent run of one upgrade, adoption or judgement."""

    experiment_id: str
    run_id: str


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a stage read: name -> snapshot. Models become model inputs, data become data sets."""

    models: Mapping[str, SnapshotId]
    data: Mapping[str, SnapshotId]


def open_upgrade(model_name: str, name: str, key: str, tags: Mapping[str, str]) -> UpgradeRun:
    """The parent run of the upgrade `key` (a digest of what was asked for): the one there is, or a new one."""
    with mlflow_errors():
        client = MlflowClient()
        experiment_id = experiment_of(model_name)
        known = client.search_runs([experiment_id], f"tags.mansard_upgrade = '{key}'", max_results=1)
        if known:
            client.update_run(known[0].info.run_id, status="RUNNING")
            return UpgradeRun(experiment_id, known[0].info.run_id)
        run = client.create_run(experiment_id, run_name=name, tags={**tags, "mansard_upgrade": key})
        return UpgradeRun(experiment_id, run.info.run_id)


def close_upgrade(run: UpgradeRun, status: str, tags: Mapping[str, str] | None = None) -> None:
    """End the parent run as FINISHED, FAILED or KILLED."""
    with mlflow_errors():
        client = MlflowClient()
        for key, value in (tags or {}).items():
            client.set_tag(run.run_id, key, value)
        client.set_terminated(run.run_id, status)


def experiment_of(model_name: str) -> str:
    """The id of the experiment that holds everything of a model name."""
    client = MlflowClient()
    name = f"mansard/{model_name}"
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        raced = client.get_experiment_by_name(name)
        assert raced is not None
        return str(raced.experiment_id)


class StageRun:
    """The child run of a stage while it runs; `add` takes what the stage's process tells of itself."""

    def __init__(self, parent: UpgradeRun, run_id: str, is_finished: bool, clock: Callable[[], float]) -> None:
        self.parent = parent
        self.run_id = run_id
        self.is_finished = is_finished
        self._clock = clock
        self._waiting: list[Metric] = []
        self._sent_at = clock()

    def add(self, metrics: Mapping[str, float], step: int) -> None:
        """Metrics at a step. A server that does not answer costs no stage its work: they wait for the next time."""
        now = int(time.time() * 1000)
        self._waiting += [Metric(key, float(value), now, step) for key, value in metrics.items()]
        if self._clock() - self._sent_at >= FLUSH_SECONDS:
            with contextlib.suppress(MlflowException):
                self._send()

    def flush(self) -> None:
        """Send what waits; MansardError when MLflow does not take it."""
        with mlflow_errors():
            self._send()

    def _send(self) -> None:
        self._sent_at = self._clock()
        client = MlflowClient()
        while self._waiting:
            batch = self._waiting[:MAX_METRICS]
            client.log_batch(self.run_id, metrics=batch)
            del self._waiting[: len(batch)]


@contextlib.contextmanager
def stage_run(
    parent: UpgradeRun, stage: str, title: str, recipe: str, clock: Callable[[], float] = time.monotonic
) -> Iterator[StageRun]:
    """The child run of one derivation, found by its recipe. It ends FAILED or KILLED when the block raises."""
    client = MlflowClient()
    with mlflow_errors():
        child = _child(client, parent, recipe)
        if child is None:
            tags = {"mlflow.parentRunId": parent.run_id, "mansard_stage": stage, "mansard_recipe": recipe}
            child = client.create_run(parent.experiment_id, run_name=title, tags=tags)
        elif child.info.status != "FINISHED":
            client.update_run(child.info.run_id, status="RUNNING")
    running = StageRun(parent, child.info.run_id, child.info.status == "FINISHED", clock)
    try:
        yield running
    except BaseException as error:
        if not running.is_finished:
            with contextlib.suppress(MlflowException):
                client.set_tag(running.run_id, "mansard_error", str(error)[:4000])
                client.set_terminated(running.run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise


def finish_stage(
    running: StageRun, derivation: Derivation, title: str, inputs: Inputs, store_uri: str, facts: Mapping[str, Any]
) -> None:
    """Record what a stage made: its logged model, inputs, facts (as parameters) and log. A repeat does nothing."""
    if running.is_finished:
        return
    running.flush()
    with mlflow_errors():
        client = MlflowClient()
        made = logged_model(running.parent.experiment_id, derivation.snapshot, title, store_uri, running.run_id)
        client.log_outputs(running.run_id, [LoggedModelOutput(made.model_id, 0)])
        known = [find_logged_model(running.parent.experiment_id, s) for s in inputs.models.values()]
        client.log_inputs(
            running.run_id,
            datasets=[data_set(name, snapshot, store_uri) for name, snapshot in inputs.data.items()],
            models=[LoggedModelInput(model.model_id) for model in known if model is not None],
        )
        now = int(time.time() * 1000)
        client.log_batch(
            running.run_id,
            metrics=[Metric("seconds", derivation.seconds, now, 0)],
            params=[Param(key, value) for key, value in flat(facts).items()],
            tags=[
                RunTag("mansard_snapshot", derivation.snapshot),
                RunTag("mansard_reused", str(derivation.reused).lower()),
                *(RunTag(f"mansard_input_{name}", s) for name, s in {**inputs.models, **inputs.data}.items()),
            ],
        )
        if derivation.log and Path(derivation.log).exists():
            client.log_artifact(running.run_id, derivation.log, "log")
        client.set_terminated(running.run_id, "FINISHED")
        running.is_finished = True


def logged_model(
    experiment_id: str, snapshot: SnapshotId, title: str, store_uri: str, run_id: str | None = None
) -> LoggedModel:
    """The external logged model of a snapshot: the one there is, or a new one."""
    known = find_logged_model(experiment_id, snapshot)
    if known is not None:
        return known
    return mlflow.create_external_model(
        name=f"{title}-{snapshot[:12]}".replace(".", "-"),
        source_run_id=run_id,
        tags={"mansard_snapshot": snapshot, "mansard_uri": snapshot_uri(store_uri, snapshot)},
        params={"snapshot": snapshot, "uri": snapshot_uri(store_uri, snapshot)},
        model_type=title,
        experiment_id=experiment_id,
    )


def find_logged_model(experiment_id: str, snapshot: SnapshotId) -> LoggedModel | None:
    found = MlflowClient().search_logged_models(
        [experiment_id], filter_string=f"tags.mansard_snapshot = '{snapshot}'", max_results=1
    )
    return found[0] if found else None


def snapshot_uri(store_uri: str, snapshot: SnapshotId) -> str:
    """Where a snapshot is: the store, and the snapshot in it. `mansard restore` brings it back."""
    return f"{store_uri}#{snapshot}"


def data_set(name: str, snapshot: SnapshotId, store_uri: str) -> DatasetInput:
    """A data snapshot as MLflow's data set."""
    source = json.dumps({"uri": snapshot_uri(store_uri, snapshot), "snapshot": snapshot})
    made = Dataset(name=name, digest=snapshot[:DATASET_DIGEST_LENGTH], source_type="mansard", source=source)
    return DatasetInput(made, [InputTag("mlflow.data.context", name.partition(".")[0])])


def log_files(run: UpgradeRun, files: Mapping[str, bytes], folder: str) -> None:
    """Small files (report, chart, verdict) as artifacts of the parent run; a repeat writes them again."""
    with mlflow_errors(), tempfile.TemporaryDirectory(prefix="mansard-") as scratch:
        for name, data in files.items():
            (Path(scratch) / name).write_bytes(data)
        MlflowClient().log_artifacts(run.run_id, scratch, folder)


def log_results(
    run: UpgradeRun, metrics: Mapping[str, float], tags: Mapping[str, str], artifact: SnapshotId | None = None
) -> None:
    """Results of the whole upgrade on its parent run, and on the artifact's logged model where there is one."""
    now = int(time.time() * 1000)
    with mlflow_errors():
        model = None if artifact is None else find_logged_model(run.experiment_id, artifact)
        model_id = None if model is None else model.model_id
        MlflowClient().log_batch(
            run.run_id,
            metrics=[Metric(key, float(value), now, 0, model_id=model_id) for key, value in metrics.items()],
            tags=[RunTag(key, value) for key, value in tags.items()],
        )


def log_series(run: UpgradeRun, series: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Metrics as (step, value) pairs on a parent run."""
    now = int(time.time() * 1000)
    metrics = [Metric(key, float(value), now, step) for key, pairs in series.items() for step, value in pairs]
    with mlflow_errors():
        MlflowClient().log_batch(run.run_id, metrics=metrics)


def run_url(run: UpgradeRun) -> str:
    """The page of a run."""
    return f"{mlflow.get_tracking_uri()}/#/experiments/{run.experiment_id}/runs/{run.run_id}"


def artifact_url(run: UpgradeRun, path: str) -> str:
    """Where a browser gets an artifact of a run."""
    return f"{mlflow.get_tracking_uri()}/get-artifact?path={quote(path, safe='')}&run_uuid={run.run_id}"


def flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested facts as MLflow parameters: dotted keys, values as text of at most 6,000 characters (its limit)."""
    found: dict[str, str] = {}
    for key, value in facts.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= flat(value, f"{name}.")
        else:
            found[name] = (value if isinstance(value, str) else json.dumps(value))[:6000]
    return found


@contextlib.contextmanager
def mlflow_errors() -> Iterator[None]:
    """MLflow's own errors as MansardError, in one line."""
    try:
        yield
    except MlflowException as error:
        first = str(error).strip().partition("\n")[0][:300]
        raise MansardError(f"MLflow at {mlflow.get_tracking_uri()}: {first}; is it up? mansard status") from error


def _child(client: MlflowClient, parent: UpgradeRun, recipe: str) -> Run | None:
    wanted = f"tags.mlflow.parentRunId = '{parent.run_id}' and tags.mansard_recipe = '{recipe}'"
    found = client.search_runs([parent.experiment_id], wanted, max_results=1)
    return found[0] if found else None
