"""`mansard verify --journal` asks every place that has a signed tip. MLflow is a local HTTP server here."""

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from flows.journal_proof import journal_text, verify_journal
from mansard.errors import Corrupt
from mansard.release.journal import Journal
from mansard.release.tip import Tip, sign_tip, write_tip
from mansard.site import Site
from mansard.site_sections import Environment, Ports


@pytest.fixture
def mlflow() -> Iterator[dict[str, object]]:
    """What the registry answers: status and body are the test's."""
    answers: dict[str, object] = {"status": 404, "body": {}}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answers["path"] = self.path
            data = json.dumps(answers["body"]).encode()
            self.send_response(int(str(answers["status"])))
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    answers["port"] = server.server_port
    yield answers
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def site(tmp_path: Path, mlflow: dict[str, object]) -> Site:
    bare = Site(tmp_path / "site.yaml", tmp_path, tmp_path, ("demo",), {"m": Environment(tmp_path, tmp_path)}, {})
    bare = replace(bare, ports=Ports(mlflow=int(str(mlflow["port"]))))
    with Journal.open(bare.journal) as journal:
        for number in range(3):
            journal.append("demo", "remark", "ada", "", {"number": number})
    return bare


def signed(site: Site, sequence: int) -> Tip:
    with Journal.open(site.journal) as journal:
        entry = journal.entry(sequence)
    assert entry is not None
    return sign_tip(site, entry)


def show(mlflow: dict[str, object], value: str) -> None:
    mlflow["status"] = 200
    tags = [{"key": "mansard_tip", "value": value}, {"key": "other", "value": "x"}]
    mlflow["body"] = {"registered_model": {"name": "demo", "tags": tags}}


def test_both_tips_are_compared(site: Site, mlflow: dict[str, object]) -> None:
    write_tip(site, signed(site, 3))
    show(mlflow, signed(site, 2).as_bytes().decode())
    facts = verify_journal(site)
    assert facts == {"entries": 3, "tips": {str(site.tip_file): 3, "MLflow's model demo": 2}, "notes": []}
    assert "the chain is whole" in journal_text(facts) and "MLflow's model demo: entry 2" in journal_text(facts)


def test_without_tips_or_mlflow_the_answer_says_what_it_does_not_prove(site: Site, mlflow: dict[str, object]) -> None:
    assert "a cut-off end would not be seen" in journal_text(verify_journal(site))
    mlflow["status"] = 500
    assert "MLflow's copy of the tip was not compared: MLflow answered 500" in journal_text(verify_journal(site))
    down = replace(site, ports=Ports(mlflow=9))
    assert "was not compared" in journal_text(verify_journal(down))


def test_mlflow_still_knows_an_end_that_was_cut_off_together_with_the_tip_file(
    site: Site, mlflow: dict[str, object], tmp_path: Path
) -> None:
    short = replace(site, home=tmp_path / "short")
    with Journal.open(short.journal) as journal, Journal.open(site.journal) as whole:
        first = whole.entries()[0]
        journal._ledger._clock = lambda: __import__("datetime").datetime.fromisoformat(first.at)
        assert journal.append("demo", "remark", "ada", "", {"number": 0}) == first
    show(mlflow, signed(site, 3).as_bytes().decode())
    for half in ("host.key", "host.pub"):
        (short.home / half).write_bytes((site.home / half).read_bytes())
    (short.home / "host.key").chmod(0o600)
    write_tip(short, signed(short, 1))
    with pytest.raises(Corrupt, match=r"ends with entry 1, but MLflow's model demo has a signed tip of entry 3"):
        verify_journal(short)


def test_a_tip_file_that_is_gone_and_a_tag_that_is_no_tip_are_corrupt(site: Site, mlflow: dict[str, object]) -> None:
    write_tip(site, signed(site, 3))
    show(mlflow, "nonsense")
    with pytest.raises(Corrupt, match="MLflow's model demo: not a signed tip"):
        verify_journal(site)
    mlflow["status"] = 404
    site.tip_file.unlink()
    with pytest.raises(Corrupt, match="is gone, though the host has signed tips here"):
        verify_journal(site)
