import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from mansard.errors import Corrupt
from mansard.records import Registration
from mansard.release import tip
from mansard.release.journal import Journal
from mansard.site import Site, load_site
from tasks import mirror, registry, tracking

# MLflow's own models use a loading strategy that SQLAlchemy is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

SITE = """
format: 1
home: home
data: data
models: [demo]
environments:
  main: {python: python, lock: lock.txt}
  serve: {python: python, lock: lock.txt}
stages: {default: main}
"""

FIRST = Registration(
    model_name="demo",
    model="a" * 64,
    artifact="b" * 64,
    verdict="baseline",
    verdict_record="c" * 64,
    fingerprint="d" * 64,
    item_records=(("code-bits", "e" * 64),),
    base_version=None,
    baseline_version=None,
    anchor_version=None,
    author="ada",
    spec_name="demo",
    spec_digest="f" * 64,
    serve={},
    release={},
    stages=(("quantize", "0" * 64, "b" * 64),),
)
SECOND = replace(
    FIRST,
    model="1" * 64,
    artifact="2" * 64,
    verdict="pass",
    verdict_record="3" * 64,
    base_version=1,
    baseline_version=1,
)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    (tmp_path / "site.yaml").write_text(SITE)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.sqlite3")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.chdir(tmp_path)  # without a server, artifacts go beside the current folder
    return load_site(tmp_path / "site.yaml")


@pytest.fixture
def journal(site: Site) -> Iterator[Journal]:
    with Journal.open(site.journal) as opened:
        yield opened


def release(journal: Journal, version: int) -> None:
    journal.start_rollout("demo", version, "ada", "", journal.pointers("demo"))
    journal.promote("demo", version, "ada", "", journal.pointers("demo"))


def test_alias_leads_to_the_artifact_and_its_base(site: Site, journal: Journal) -> None:
    journal.register(FIRST, None)
    journal.register(SECOND, None)
    release(journal, 1)
    release(journal, 2)
    mirror.reconcile(site, journal)
    client = MlflowClient()
    stable = client.get_model_version_by_alias("demo", "stable")
    assert stable.tags["mansard_version"] == "2"
    assert stable.tags["mansard_verdict"] == "pass"
    assert stable.tags["mansard_state"] == "promoted"
    assert stable.tags["mansard_base"] == FIRST.model
    logged = client.get_logged_model(stable.source.removeprefix("models:/"))
    assert logged.tags["mansard_snapshot"] == SECOND.artifact
    previous = client.get_model_version_by_alias("demo", "previous")
    assert previous.tags["mansard_model"] == FIRST.model


def test_mlflow_may_count_otherwise_than_the_journal(site: Site, journal: Journal) -> None:
    client = MlflowClient()
    client.create_registered_model("demo")
    strange = tracking.logged_model(tracking.experiment_of("demo"), "9" * 64, "by-hand", site.store_uri)
    client.create_model_version("demo", f"models:/{strange.model_id}", model_id=strange.model_id)
    journal.register(FIRST, None)
    release(journal, 1)
    mirror.reconcile(site, journal)
    found = client.get_model_version_by_alias("demo", "stable")
    assert (str(found.version), found.tags["mansard_version"]) == ("2", "1")


def test_what_was_changed_by_hand_is_mended(site: Site, journal: Journal) -> None:
    journal.register(FIRST, None)
    journal.register(SECOND, None)
    release(journal, 1)
    mirror.reconcile(site, journal)
    client = MlflowClient()
    client.set_registered_model_alias("demo", "stable", "2")
    client.set_registered_model_alias("demo", "canary", "2")
    client.set_registered_model_alias("demo", "mine", "2")
    client.set_model_version_tag("demo", "2", "mansard_verdict", "wonderful")
    client.delete_model_version("demo", "2")
    assert mirror.reconcile(site, journal) > 0
    aliases = client.get_registered_model("demo").aliases
    assert {k: str(v) for k, v in aliases.items() if k in registry.ALIASES} == {"stable": "1"}
    versions = client.search_model_versions("name = 'demo'")
    assert {v.tags["mansard_version"]: v.tags["mansard_verdict"] for v in versions} == {"1": "baseline", "2": "pass"}
    assert mirror.reconcile(site, journal) == 0


def test_a_rollback_moves_the_aliases_back(site: Site, journal: Journal) -> None:
    journal.register(FIRST, None)
    journal.register(SECOND, None)
    release(journal, 1)
    release(journal, 2)
    mirror.reconcile(site, journal)
    journal.rollback("demo", 1, "grace", "it is bad", journal.pointers("demo"))
    mirror.reconcile(site, journal)
    client = MlflowClient()
    assert {k: str(v) for k, v in client.get_registered_model("demo").aliases.items()} == {"stable": "1"}
    [second] = [v for v in client.search_model_versions("name = 'demo'") if v.tags["mansard_version"] == "2"]
    assert second.tags["mansard_state"] == "rolled back"


def signed(site: Site, journal: Journal) -> tip.Tip:
    newest = journal.tip()
    assert newest is not None
    made = tip.sign_tip(site, newest)
    tip.write_tip(site, made)
    return made


def test_mlflow_shows_the_signed_tip_and_never_an_earlier_one(site: Site, journal: Journal) -> None:
    journal.register(FIRST, None)
    early = signed(site, journal)
    release(journal, 1)
    late = signed(site, journal)
    mirror.reconcile(site, journal)
    client = MlflowClient()
    assert client.get_registered_model("demo").tags["mansard_tip"] == late.as_bytes().decode().strip()
    tip.write_tip(site, early)
    with pytest.raises(Corrupt, match=f"has the signed tip of entry {late.sequence}.*was the journal cut off"):
        mirror.reconcile(site, journal)
    assert client.get_registered_model("demo").tags["mansard_tip"] == late.as_bytes().decode().strip()


def test_a_new_tip_reaches_mlflow_without_a_new_entry(site: Site, journal: Journal) -> None:
    journal.register(FIRST, None)
    watch = mirror.Mirror(site)
    watch.look(journal)
    assert "mansard_tip" not in MlflowClient().get_registered_model("demo").tags
    signed(site, journal)
    watch.look(journal)
    assert "mansard_tip" in MlflowClient().get_registered_model("demo").tags


def test_mirror_waits_for_a_journal_that_is_down(site: Site, tmp_path: Path) -> None:
    """A folder where the file should be: SQLite cannot open it."""
    site.journal.mkdir(parents=True)  # type: ignore[union-attr]
    stop = threading.Event()
    thread = threading.Thread(target=mirror.run, args=(site, stop))
    thread.start()
    try:
        waiting = threading.Event()
        while not (site.run / "mirror.json").exists() and thread.is_alive():
            waiting.wait(0.05)
        assert "unable to open" in json.loads((site.run / "mirror.json").read_text())["trouble"]
        site.journal.rmdir()  # type: ignore[union-attr]
        with Journal.open(site.journal) as opened:
            opened.register(FIRST, None)
        while json.loads((site.run / "mirror.json").read_text())["sequence"] == 0 and thread.is_alive():
            waiting.wait(0.05)
        assert thread.is_alive()
    finally:
        stop.set()
        thread.join(timeout=60)


def test_mirror_waits_for_an_mlflow_that_is_down(
    site: Site, journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.register(FIRST, None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    watch = mirror.Mirror(site)
    watch.look(journal)
    lag = json.loads((site.run / "mirror.json").read_text())
    assert (lag["format"], lag["sequence"], lag["behind"]) == (1, 0, 1)
    assert "http://127.0.0.1:9" in lag["trouble"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.sqlite3")
    watch.look(journal)
    lag = json.loads((site.run / "mirror.json").read_text())
    assert (lag["sequence"], lag["behind"], lag["trouble"]) == (1, 0, "")


def test_mirror_follows_the_journal_until_it_is_told_to_stop(site: Site, journal: Journal) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=mirror.run, args=(site, stop))
    thread.start()
    try:
        journal.register(FIRST, None)
        client = MlflowClient()
        waiting = threading.Event()
        while not client.search_model_versions("name = 'demo'") and thread.is_alive():
            waiting.wait(0.1)
        [version] = client.search_model_versions("name = 'demo'")
        assert version.tags["mansard_artifact"] == FIRST.artifact
    finally:
        stop.set()
        thread.join(timeout=60)
    assert not thread.is_alive()
