from pathlib import Path

import pytest
from mlflow import MlflowClient

from mansard.errors import MansardError
from mansard.records import Derivation
from tasks import tracking

# MLflow's own models use a loading strategy that SQLAlchemy is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

BASE, GROWN, DATA = "a" * 64, "b" * 64, "c" * 64


@pytest.fixture
def mlflow_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.sqlite3")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)  # without a server, artifacts go beside the current folder
    return MlflowClient()


def derived(stage: str, snapshot: str, recipe: str, reused: bool = False, log: str = "") -> Derivation:
    return Derivation(stage, snapshot, recipe, reused=reused, seconds=1.5, log=log)


def record(store_uri: str, log: str = "", reused: bool = False) -> tracking.UpgradeRun:
    """One upgrade of two stages."""
    run = tracking.open_upgrade("demo", "upgrade demo", "k" * 64, {"mansard_author": "ada"})
    none: dict[str, str] = {}
    with tracking.stage_run(run, "pretrain", "base", "0" * 64) as base:
        tracking.finish_stage(
            base,
            derived("pretrain", BASE, "0" * 64, reused),
            "base",
            tracking.Inputs(none, {"data": DATA}),
            store_uri,
            {},
        )
    with tracking.stage_run(run, "expand", "expand", "1" * 64) as expand:
        expand.add({"loss": 2.0}, 10)
        tracking.finish_stage(
            expand,
            derived("expand", GROWN, "1" * 64, reused, log),
            "expand",
            tracking.Inputs({"model": BASE}, none),
            store_uri,
            {"expand": {"blocks": 2, "positions": [0, 1]}},
        )
    tracking.close_upgrade(run, "FINISHED", {"mansard_verdict": "pass"})
    return run


def test_an_upgrade_is_a_parent_run_with_a_child_for_each_stage(mlflow_here: MlflowClient, tmp_path: Path) -> None:
    log = tmp_path / "expand.log"
    log.write_text("what the stage said\n")
    run = record((tmp_path / "store").as_uri(), str(log))
    children = mlflow_here.search_runs([run.experiment_id], f"tags.mlflow.parentRunId = '{run.run_id}'")
    by_stage = {child.data.tags["mansard_stage"]: child for child in children}
    assert sorted(by_stage) == ["expand", "pretrain"]
    expand = by_stage["expand"]
    assert expand.info.status == "FINISHED"
    assert expand.data.params == {"expand.blocks": "2", "expand.positions": "[0, 1]"}
    assert expand.data.metrics == {"loss": 2.0, "seconds": 1.5}
    assert expand.data.tags["mansard_snapshot"] == GROWN
    assert expand.data.tags["mansard_input_model"] == BASE
    assert [a.path for a in mlflow_here.list_artifacts(expand.info.run_id, "log")] == ["log/expand.log"]
    assert mlflow_here.get_run(run.run_id).data.tags["mansard_verdict"] == "pass"


def test_logged_models_lead_from_a_snapshot_to_what_it_was_made_of(mlflow_here: MlflowClient, tmp_path: Path) -> None:
    run = record((tmp_path / "store").as_uri())
    grown = tracking.find_logged_model(run.experiment_id, GROWN)
    assert grown is not None and grown.tags["mansard_uri"] == f"{(tmp_path / 'store').as_uri()}#{GROWN}"
    source = mlflow_here.get_run(grown.source_run_id)
    [read] = source.inputs.model_inputs
    base = mlflow_here.get_logged_model(read.model_id)
    assert base.tags["mansard_snapshot"] == BASE
    [data] = mlflow_here.get_run(base.source_run_id).inputs.dataset_inputs
    assert data.dataset.digest == DATA[:36] and DATA in data.dataset.source


def test_a_repeat_adds_neither_runs_nor_models(mlflow_here: MlflowClient, tmp_path: Path) -> None:
    first = record((tmp_path / "store").as_uri())
    assert record((tmp_path / "store").as_uri(), reused=True) == first
    assert len(mlflow_here.search_runs([first.experiment_id])) == 3
    assert len(mlflow_here.search_logged_models([first.experiment_id])) == 2


def test_a_stage_that_fails_leaves_a_failed_run_that_the_next_try_takes_over(
    mlflow_here: MlflowClient, tmp_path: Path
) -> None:
    run = tracking.open_upgrade("demo", "upgrade demo", "k" * 64, {})
    with pytest.raises(ZeroDivisionError), tracking.stage_run(run, "train", "train", "2" * 64) as failed:
        raise ZeroDivisionError("loss is not finite")
    told = mlflow_here.get_run(failed.run_id)
    assert (told.info.status, told.data.tags["mansard_error"]) == ("FAILED", "loss is not finite")
    with tracking.stage_run(run, "train", "train", "2" * 64) as again:
        assert again.run_id == failed.run_id
        assert mlflow_here.get_run(again.run_id).info.status == "RUNNING"


def test_metrics_are_sent_while_the_stage_runs(mlflow_here: MlflowClient, tmp_path: Path) -> None:
    now = 0.0
    run = tracking.open_upgrade("demo", "upgrade demo", "k" * 64, {})
    with tracking.stage_run(run, "train", "train", "2" * 64, clock=lambda: now) as running:
        running.add({"loss": 3.0}, 1)
        assert mlflow_here.get_run(running.run_id).data.metrics == {}
        now += tracking.FLUSH_SECONDS
        running.add({"loss": 2.5}, 2)
        history = mlflow_here.get_metric_history(running.run_id, "loss")
        assert [(m.step, m.value) for m in history] == [(1, 3.0), (2, 2.5)]
        running.add({"loss": 2.0}, 3)
        running.flush()
        assert mlflow_here.get_run(running.run_id).data.metrics["loss"] == 2.0


def test_a_server_that_is_down_is_one_line(mlflow_here: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(MansardError, match=r"MLflow at http://127.0.0.1:9: .*; is it up\? mansard status") as raised:
        tracking.open_upgrade("demo", "upgrade demo", "k" * 64, {})
    assert "\n" not in str(raised.value)
